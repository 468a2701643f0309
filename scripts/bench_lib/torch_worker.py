"""The same nets, attack and training step in plain PyTorch, as one would write them.

Runs in any interpreter that has PyTorch; knows nothing of JAX or robustjax.
"""

import functools
import json
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from worker import Prepared, serve

OPTIONS = json.loads(sys.argv[1])


class MadryMnist(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(7 * 7 * 64, 1024)
        self.head = nn.Linear(1024, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class PreActResNet18(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        blocks, inputs = [], width
        for stage in range(4):
            for block in range(2):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "madry_mnist": (MadryMnist, (1, 28, 28), 0.3),
    "preact_resnet18_w16": (lambda: PreActResNet18(16), (3, 32, 32), 8 / 255),
}
STEP = 0.25


def pgd(model: nn.Module, x, y, epsilon: float, num_steps: int):
    """Linf, random start; only the input's gradient is computed."""
    x_adv = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv.requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        with torch.no_grad():
            x_adv = x_adv + STEP * epsilon * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv


def programs(net: str, layout: str) -> dict[str, Callable[[], Prepared]]:
    make, shape, epsilon = NETS[net]
    batch, train_batch = OPTIONS["batch"], OPTIONS["train_batch"]
    torch.manual_seed(0)
    memory = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    model = make().to(memory_format=memory[layout])
    x = torch.rand(max(batch, train_batch), *shape).to(memory_format=memory[layout])
    y = torch.randint(10, x.shape[:1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rows = [(x[:n].contiguous(memory_format=memory[layout]), y[:n])
            for n in (batch, train_batch)]  # fmt: skip

    def attack():
        model.eval()
        pgd(model, *rows[0], epsilon, OPTIONS["steps"])

    def train():
        model.eval()
        x_adv = pgd(model, *rows[1], epsilon, OPTIONS["inner_steps"])
        model.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x_adv), rows[1][1]).backward()
        optimizer.step()

    count = sum(p.numel() for p in model.parameters())
    one = functools.partial(Prepared, report={"parameters": count})
    return {
        f"{net}/loop/{layout}": lambda: one(attack, OPTIONS["steps"]),
        f"{net}/train/{layout}": lambda: one(train, 1),
    }


if __name__ == "__main__":
    if OPTIONS["threads"]:
        torch.set_num_threads(OPTIONS["threads"])
    table: dict[str, Callable[[], Prepared]] = {}
    for net in OPTIONS["nets"]:
        if net in NETS:
            for layout in ("nchw", "channels_last"):
                table |= programs(net, layout)
    serve(
        table,
        {
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "threads": torch.get_num_threads(),
            "programs": sorted(table),
        },
    )
