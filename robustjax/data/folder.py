"""A folder of images as a source to stream from: read and decoded when asked for."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustjax.data import formats


@dataclass(frozen=True)
class ImageFolder:
    """Images on disk as a `Source` of dicts; made by `image_folder`.

    files:   one path per example.
    labels:  one per example, the place of its class among `classes`.
    classes: their names.
    size:    edge of the square that every image is brought to; None: as it is.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    size: int | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_module = formats.pillow()
        path = self.files[index]
        try:
            with image_module.open(path) as image:
                image = image.convert("RGB")
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read as an image ({error}). Remove or replace it."
            ) from error
        if self.size is not None:
            image = _square(image, self.size, image_module)
        return {"image": np.asarray(image), "label": self.labels[index]}


def image_folder(
    folder: str | os.PathLike[str], split: str = "train", size: int | None = None
) -> ImageFolder:
    """Open `FOLDER/SPLIT/CLASS/*.jpg` (png, jpeg, bmp) without reading the images.

    Args:
      folder: what holds the splits, such as ImageNet's.
      split: the name of a folder in it.
      size: cut the largest square in the middle out and scale it to so many pixels,
        bilinearly over all of its pixels; None: images stay as they are, and must have
        one size to be streamed.

    Returns:
      A source for `stream`: examples `{"image": uint8 [H, W, 3], "label": int}`, in the
      alphabetical order of classes and files.

    Raises:
      ImportError: Pillow is not installed.
      FileNotFoundError: there is no such folder, or there are no images in it.
      ValueError: size is not positive; on access, a file that is no image.

    >>> image_folder("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no/such/folder/train holds no images. ...
    """
    formats.pillow()
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; give a positive number of pixels, or None.")
    root = Path(folder).expanduser() / split
    files = formats.image_files(root)
    if not files:
        raise FileNotFoundError(
            f"{root} holds no images. An image folder is {root.name}/CLASS/*.png "
            f"({', '.join(formats.IMAGE_SUFFIXES)})."
        )
    classes = tuple(sorted({name for _, name in files}))
    place = {name: label for label, name in enumerate(classes)}
    return ImageFolder(
        tuple(path for path, _ in files),
        tuple(place[name] for _, name in files),
        classes,
        size,
    )


def _square(image: Any, size: int, image_module: Any) -> Any:
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return square.resize((size, size), image_module.Resampling.BILINEAR)
