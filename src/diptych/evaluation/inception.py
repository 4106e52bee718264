"""The Inception network of FID: v3 as TensorFlow's 2015-12-05 release has it (Szegedy et al. 2016, arXiv 1512.00567).

B batch, C channels. It differs from the later v3: average pools leave the border out of the count, and the last block
pools by maximum. Features are the 2048 channels before the classifier.

Weights: `weights-inception-2015-12-05-6726825d.pth`, as torch-fidelity and pytorch-fid publish them. That file is a
pickle, the only one that is ever opened: after its whole SHA-256 was compared, for tensors alone, and once, since a
.safetensors copy is written beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.checkpoints.tensors import load_into, read_tensors
from diptych.core.errors import UserError
from diptych.core.files import write_file
from diptych.evaluation.download import File, fetch, file_digest

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the published file."""
SIDE = 299
Size = int | tuple[int, int]


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def border_free(x: Tensor) -> Tensor:
    """3x3 average whose count leaves the border out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, double 3x3, pool."""

    def __init__(self, inputs: int, pool: int, d: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64 // d, 1)
        self.branch5x5_1 = Convolution(inputs, 48 // d, 1)
        self.branch5x5_2 = Convolution(48 // d, 64 // d, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = Convolution(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96 // d, 96 // d, 3, padding=1)
        self.branch_pool = Convolution(inputs, pool // d, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(border_free(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384 // d, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = Convolution(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96 // d, 96 // d, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: 7x7 taken apart into rows and columns."""

    def __init__(self, inputs: int, middle: int, d: int) -> None:
        super().__init__()
        m, out = middle // d, 192 // d
        self.branch1x1 = Convolution(inputs, out, 1)
        self.branch7x7_1 = Convolution(inputs, m, 1)
        self.branch7x7_2 = Convolution(m, m, (1, 7), padding=(0, 3))
        self.branch7x7_3 = Convolution(m, out, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = Convolution(inputs, m, 1)
        self.branch7x7dbl_2 = Convolution(m, m, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = Convolution(m, m, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = Convolution(m, m, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = Convolution(m, out, (1, 7), padding=(0, 3))
        self.branch_pool = Convolution(inputs, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(border_free(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        m = 192 // d
        self.branch3x3_1 = Convolution(inputs, m, 1)
        self.branch3x3_2 = Convolution(m, 320 // d, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inputs, m, 1)
        self.branch7x7x3_2 = Convolution(m, m, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(m, m, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(m, m, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8: 3x3 as a row and a column side by side. The last one pools by maximum."""

    def __init__(self, inputs: int, d: int, *, last: bool) -> None:
        super().__init__()
        m = 384 // d
        self.last = last
        self.branch1x1 = Convolution(inputs, 320 // d, 1)
        self.branch3x3_1 = Convolution(inputs, m, 1)
        self.branch3x3_2a = Convolution(m, m, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(m, m, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(inputs, 448 // d, 1)
        self.branch3x3dbl_2 = Convolution(448 // d, m, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(m, m, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(m, m, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(inputs, 192 // d, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else border_free(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """Pictures (B, 3, H, W) uint8 to features (B, 2048 / narrow) float32.

    narrow: 1 for the published network; a divisor of 16 makes a thinner one for tests.
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        d = narrow
        if d < 1 or 16 % d:
            raise UserError(f"narrow must divide 16, not {narrow}")
        self.Conv2d_1a_3x3 = Convolution(3, 32 // d, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32 // d, 32 // d, 3)
        self.Conv2d_2b_3x3 = Convolution(32 // d, 64 // d, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64 // d, 80 // d, 1)
        self.Conv2d_4a_3x3 = Convolution(80 // d, 192 // d, 3)
        self.Mixed_5b = BlockA(192 // d, 32, d)
        self.Mixed_5c = BlockA(256 // d, 64, d)
        self.Mixed_5d = BlockA(288 // d, 64, d)
        self.Mixed_6a = BlockB(288 // d, d)
        self.Mixed_6b = BlockC(768 // d, 128, d)
        self.Mixed_6c = BlockC(768 // d, 160, d)
        self.Mixed_6d = BlockC(768 // d, 160, d)
        self.Mixed_6e = BlockC(768 // d, 192, d)
        self.Mixed_7a = BlockD(768 // d, d)
        self.Mixed_7b = BlockE(1280 // d, d, last=False)
        self.Mixed_7c = BlockE(2048 // d, d, last=True)
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        x = (stretch(pictures.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def stretch(x: Tensor, side: int) -> Tensor:
    """Bilinear to (B, C, side, side) as TensorFlow 1 does it: corners at multiples of in / out, no half-pixel shift."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (length / side)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        part = (at - low).view([-1 if axis == dim else 1 for axis in range(4)])
        near = x.index_select(dim, low)
        x = near + (x.index_select(dim, high) - near) * part
    return x


def load_inception(path: Path | None, folder: Path, *, online: bool = True) -> Inception:
    """The published network.

    Args:
        path: the published .pth, or a .safetensors of the same names; None for the one in `folder`, which is fetched
            and converted on first use where `online`.
    """
    converted = folder / "inception-2015-12-05.safetensors"
    source = path or converted
    if path is None and not converted.is_file():
        published = folder / URL.rsplit("/", 1)[-1]
        if not published.is_file():
            if not online:
                raise UserError(f"{published} is missing; it is published at {URL}")
            download(published)
        source = published
    if source.suffix == ".pth":
        return from_published(source)
    network = Inception()
    load_into(network, read_tensors([source]), str(source), optional=lambda name: name.endswith("num_batches_tracked"))
    return network


def download(path: Path) -> None:
    """The published weights; UserError also where another file comes."""
    fetch(File(url=URL, sha256=SHA256, licence="Apache-2.0"), path)


def from_published(path: Path) -> Inception:
    """The network from the published file; its checksum is compared, and nothing but tensors is read from it.

    A .safetensors copy is written beside it, so that it is read in this form once.
    """
    try:
        sha256 = file_digest(path)
    except OSError as error:
        raise UserError(f"{path}: not a readable file ({error.strerror})") from error
    if sha256 != SHA256:
        raise UserError(f"{path}: not the published weights: SHA-256 {sha256[:8]}..., published is {SHA256[:8]}...")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    network = Inception()
    kept = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    load_into(network, kept.items(), str(path), optional=lambda name: name.endswith("num_batches_tracked"))
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    write_file(path.with_name("inception-2015-12-05.safetensors"), lambda temporary: save_file(weights, temporary))
    return network
