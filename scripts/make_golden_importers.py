"""Writes tests/golden/importers: small nets of every architecture, and their logits.

golden.npz holds for each net NAME the names, shapes and (float16) numbers of its
state_dict, its inputs (uint8 NHWC) and PyTorch's logits (float64 arithmetic, float32
stored). tiny.* are one state_dict in every format, tiny_refused.pt asks for a class
that is no tensor.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch_nets as nets

OUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "importers"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

# Small widths; the structure is the published one but for the WideResNets' depth.
GOLDEN = {
    "preact_resnet18": nets.PreAct(1, 5, raw=False),
    "preact_resnet18_raw": nets.Normalized(nets.PreAct(2, 5, raw=True), MEAN, STD),
    "resnet18": nets.PostAct(2, 5, bottleneck=False),
    "resnet50": nets.Normalized(nets.PostAct(1, 5, bottleneck=True), MEAN, STD),
    "wide_resnet_16_2": nets.Wide(16, 2, 2, 5),
    "wide_resnet_16_2_sub_block1": nets.Wide(16, 2, 2, 5, sub_block1=True),
    "dm_preact_resnet18": nets.DeepMind(None, 0, 1, 5, 3, 0, MEAN, STD),
    "dm_wide_resnet_16_2": nets.DeepMind(16, 2, 2, 5, 3, 0, MEAN, STD),
    "dm_wide_resnet_10_1_grey": nets.DeepMind(10, 1, 2, 5, 1, 2, (0.5,), (0.25,)),
}


def as_numpy(state):
    return {
        name.removeprefix("net."): tensor.numpy()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def write_golden():
    found = {}
    numbers = np.random.default_rng(0)
    for seed, (name, net) in enumerate(GOLDEN.items()):
        nets.randomize(net, seed)
        side, channels = (28, 1) if name.endswith("grey") else (32, 3)
        x = numbers.integers(0, 256, (2, side, side, channels), dtype=np.uint8)
        x[1, :, : side // 2] //= 4  # the two differ by more than noise
        x[1, side // 2 :, :, :1] = 255
        state = as_numpy(net.state_dict())
        found[f"{name}/names"] = np.array(list(state))
        found[f"{name}/shapes"] = np.array(
            json.dumps([v.shape for v in state.values()])
        )
        flat = np.concatenate([v.reshape(-1) for v in state.values()])
        found[f"{name}/values"] = flat.astype(np.float16)
        assert np.array_equal(found[f"{name}/values"].astype(np.float32), flat)
        found[f"{name}/x"] = x
        with torch.no_grad():
            image = torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255
            found[f"{name}/logits"] = net.double()(image).float().numpy()
    np.savez_compressed(OUT / "golden.npz", **found)


def write_safetensors(path, arrays):
    """The format by its definition: a length, JSON, bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        kind = {"float32": "F32", "int64": "I64"}[str(array.dtype)]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_formats():
    net = nets.randomize(nets.Wide(10, 1, 2, 3), 7)
    state = net.state_dict()
    nested = {
        "epoch": 3,
        "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items()),
        "optimizer": {"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": []},
    }
    torch.save(nested, OUT / "tiny.pt")
    torch.save(nested, OUT / "tiny_legacy.pt", _use_new_zipfile_serialization=False)
    half = {name: tensor.bfloat16() for name, tensor in state.items() if "fc" in name}
    strided = {
        "view": torch.arange(12.0).view(3, 4).t()[1:],
        "empty": torch.zeros(0, 2),
    }
    kinds = {"parameter": torch.nn.Parameter(torch.ones(2)), "flag": torch.tensor(True)}
    torch.save({"last": {**half, **strided, **kinds}, "best": half}, OUT / "kinds.pt")
    write_safetensors(OUT / "tiny.safetensors", as_numpy(state))
    np.savez_compressed(OUT / "tiny.npz", **as_numpy(state))
    torch.save({"state_dict": state, "args": Path("x")}, OUT / "tiny_refused.pt")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    write_golden()
    write_formats()
    total = sum(path.stat().st_size for path in OUT.iterdir())
    print(f"{OUT}: {total} bytes")
