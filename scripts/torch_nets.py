"""The architectures of published checkpoints in PyTorch, for golden files only.

Written from their descriptions, in a form of its own, with the published names of the
arrays; independent of robustjax.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, size, stride=1, padding=None):
    padding = size // 2 if padding is None else padding
    return nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)


def tree(**modules):
    """A module that is only a place for others, under their names."""
    place = nn.Module()
    for name, module in modules.items():
        place.add_module(name, module)
    return place


def strides(stage, count):
    return [1 if stage == 0 else 2] + [1] * (count - 1)


def spatial_mean(x):
    return x.mean((2, 3))


class PreAct(nn.Module):
    """PreActResNet-18: `raw` is the form of Wong et al. (shortcuts from the raw input,
    no BatchNorm at the end)."""

    def __init__(self, width, num_classes, raw):
        super().__init__()
        self.raw, inputs = raw, width
        self.conv1 = conv(3, width, 3)
        for stage in range(4):
            outputs, blocks = width * 2**stage, []
            for stride in strides(stage, 2):
                parts = {
                    "bn1": nn.BatchNorm2d(inputs),
                    "conv1": conv(inputs, outputs, 3, stride),
                    "bn2": nn.BatchNorm2d(outputs),
                    "conv2": conv(outputs, outputs, 3),
                }
                if inputs != outputs or stride == 2:
                    parts["shortcut"] = nn.Sequential(conv(inputs, outputs, 1, stride))
                blocks.append(tree(**parts))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if not raw:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                inner = block.bn1(x).relu()
                if hasattr(block, "shortcut"):
                    x = block.shortcut(x if self.raw else inner)
                x = x + block.conv2(block.bn2(block.conv1(inner)).relu())
        if not self.raw:
            x = self.bn(x).relu()
        return self.linear(spatial_mean(x))


class PostAct(nn.Module):
    """ResNet-18 and ResNet-50 in their CIFAR form."""

    def __init__(self, width, num_classes, bottleneck):
        super().__init__()
        self.bottleneck, inputs = bottleneck, width
        self.conv1, self.bn1 = conv(3, width, 3), nn.BatchNorm2d(width)
        for stage, count in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)):
            inner, blocks = width * 2**stage, []
            outputs = 4 * inner if bottleneck else inner
            for stride in strides(stage, count):
                if bottleneck:
                    parts = {
                        "conv1": conv(inputs, inner, 1),
                        "conv2": conv(inner, inner, 3, stride),
                        "conv3": conv(inner, outputs, 1),
                        "bn3": nn.BatchNorm2d(outputs),
                    }
                else:
                    parts = {
                        "conv1": conv(inputs, inner, 3, stride),
                        "conv2": conv(inner, inner, 3),
                    }
                parts["bn1"] = nn.BatchNorm2d(inner)
                parts["bn2"] = nn.BatchNorm2d(inner)
                if stride == 2 or inputs != outputs:
                    parts["shortcut"] = nn.Sequential(
                        conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
                    )
                blocks.append(tree(**parts))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                out = block.bn1(block.conv1(x)).relu()
                out = block.bn2(block.conv2(out))
                if self.bottleneck:
                    out = block.bn3(block.conv3(out.relu()))
                if hasattr(block, "shortcut"):
                    x = block.shortcut(x)
                x = (out + x).relu()
        return self.linear(spatial_mean(x))


class Wide(nn.Module):
    """WideResNet-d-k; `sub_block1` is stored by some and used by none."""

    def __init__(self, depth, factor, width, num_classes, sub_block1=False):
        super().__init__()
        count, inputs = (depth - 4) // 6, width
        self.conv1 = conv(3, width, 3)
        names = ["block1", "block2", "block3"] + ["sub_block1"] * sub_block1
        for stage, name in enumerate(names):
            stage, inputs = (0, width) if name == "sub_block1" else (stage, inputs)
            outputs, blocks = width * factor * 2**stage, []
            for stride in strides(stage, count):
                parts = {
                    "bn1": nn.BatchNorm2d(inputs),
                    "conv1": conv(inputs, outputs, 3, stride),
                    "bn2": nn.BatchNorm2d(outputs),
                    "conv2": conv(outputs, outputs, 3),
                }
                if inputs != outputs:
                    parts["convShortcut"] = conv(inputs, outputs, 1, stride)
                blocks.append(tree(**parts))
                inputs = outputs
            self.add_module(name, tree(layer=nn.Sequential(*blocks)))
        last = 4 * width * factor
        self.bn1, self.fc = nn.BatchNorm2d(last), nn.Linear(last, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            for block in stage.layer:
                inner = block.bn1(x).relu()
                if hasattr(block, "convShortcut"):
                    x = block.convShortcut(inner)
                x = x + block.conv2(block.bn2(block.conv1(inner)).relu())
        return self.fc(spatial_mean(self.bn1(x).relu()))


class DeepMind(nn.Module):
    """DeepMind's nets with SiLU: WideResNet-d-k, or PreActResNet-18 (depth None).

    Convolutions with stride 2 see one more row and column of zeros, at the end.
    """

    def __init__(self, depth, factor, width, num_classes, channels, border, mean, std):
        super().__init__()
        self.wide, self.border = depth is not None, border
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), False)
        first, second = (
            ("conv_0", "conv_1") if self.wide else ("conv_2d_1", "conv_2d_2")
        )
        stem = "init_conv" if self.wide else "conv_2d"
        self.names, inputs = (stem, first, second), width
        self.add_module(stem, conv(channels, width, 3))
        stages = []
        for stage in range(3 if self.wide else 4):
            outputs = width * (factor if self.wide else 1) * 2**stage
            blocks = []
            for stride in strides(stage, (depth - 4) // 6 if self.wide else 2):
                parts = {
                    "batchnorm_0": nn.BatchNorm2d(inputs),
                    first: conv(inputs, outputs, 3, stride, 2 - stride),
                    "batchnorm_1": nn.BatchNorm2d(outputs),
                    second: conv(outputs, outputs, 3),
                }
                if inputs != outputs:
                    size = 1 if self.wide else 3
                    parts["shortcut"] = conv(inputs, outputs, size, stride, 0)
                blocks.append(tree(**parts))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        if self.wide:
            self.layer = nn.Sequential(*(tree(block=stage) for stage in stages))
        else:
            for number, stage in enumerate(stages):
                self.add_module(f"layer_{number}", stage)
        self.batchnorm = nn.BatchNorm2d(inputs)
        self.logits = nn.Linear(inputs, num_classes)

    def stages(self):
        if self.wide:
            return [group.block for group in self.layer]
        return [getattr(self, f"layer_{number}") for number in range(4)]

    def forward(self, x):
        stem, first, second = (name for name in self.names)
        x = F.pad(x, [self.border] * 4)
        x = getattr(self, stem)((x - self.mean) / self.std)
        for stage in self.stages():
            for block in stage:
                inner = F.silu(block.batchnorm_0(x))
                conv1 = getattr(block, first)
                uneven = [0, 1, 0, 1] if conv1.stride[0] == 2 else [0, 0, 0, 0]
                if hasattr(block, "shortcut"):
                    x = block.shortcut(inner if self.wide else F.pad(x, uneven))
                out = F.silu(block.batchnorm_1(conv1(F.pad(inner, uneven))))
                x = x + getattr(block, second)(out)
        x = F.silu(self.batchnorm(x))
        return self.logits(spatial_mean(x))


class Normalized(nn.Module):
    """A net behind `mu` and `sigma`, its buffers, as RobustBench keeps them."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mu", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return self.net((x - self.mu) / self.sigma)


def randomize(net, seed):
    """Weights by seed, exact in float16; BatchNorm statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like, scale):
        return scale * torch.randn(like.shape, generator=generator)

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(normal(module.bias, 0.3))
                module.running_mean.copy_(normal(module.running_mean, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                inputs = module.weight[0].numel()
                module.weight.copy_(normal(module.weight, (2 / inputs) ** 0.5))
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias, 1.0))
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
    return net.eval()
