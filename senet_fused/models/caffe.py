"""Weights of the papers' original Caffe networks: layer names as in their prototxts, and how their blobs load."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CaffeResult", "caffe_names", "load_caffe"]

_SHOWN = 5  # lines of an error's list
_KINDS = "SENet-154, SE-ResNet-50, 101 and 152, SE-ResNeXt-50 and 101, and SE-BN-Inception"
# Of a block, (its number + 1)_(its place + 1)_ in front.
_BLOCK = {
    "conv1": "1x1_reduce", "bn1": "1x1_reduce", "conv2": "3x3", "bn2": "3x3", "conv3": "1x1_increase",
    "bn3": "1x1_increase", "se_module.fc1": "1x1_down", "se_module.fc2": "1x1_up", "downsample.0": "1x1_proj",
    "downsample.1": "1x1_proj",
}  # fmt: skip
_STEMS = {1: ("conv1/7x7_s2",), 3: ("conv1_1/3x3_s2", "conv1_2/3x3", "conv1_3/3x3")}
_IN_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
_IN_STEM = re.compile(r"layer0\.(?:conv|bn)(\d)")
_IN_INCEPTION = re.compile(r"(conv\d|inception_\d[a-z])_(.+?)(_bn)?")
_INCEPTION = {"double_3x3_reduce": "double3x3_reduce", "double_3x3_1": "double3x3a", "double_3x3_2": "double3x3b"}
# What names a blob in a flat file, behind the name of the layer.
_BLOB = re.compile(r"(.+)[/_.:](\d+)")


class CaffeResult(NamedTuple):
    """Names of Caffe layers: those of the model that the weights lack, those of the weights that the model lacks."""

    missing: list[str]
    unexpected: list[str]


def caffe_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The layers of the original Caffe network that have weights, each with the state-dict keys of its blobs, in order.

    Convolutions and the classifier have a weight and perhaps a bias, ``.../bn`` the running mean and variance (its
    third blob, the factor they are to be divided by, has no key), ``.../bn/scale`` a weight and a bias. Together they
    are all parameters and buffers but ``num_batches_tracked``. Biases of convolutions in front of a BatchNorm are
    listed, although the original networks have none.

    >>> caffe_names(senet154())["conv2_1_3x3/bn"]
    ('layer1.0.bn2.running_mean', 'layer1.0.bn2.running_var')

    Source: the prototxts of https://github.com/hujie-frank/SENet. Networks are known by their keys, so those of timm's
    ``legacy_senet`` and of Cadene's ``pretrainedmodels`` are known, too.

    Raises:
        ValueError: a network that has no Caffe original.
    """
    keys, names = _tensors(model), {}
    stem = sum(1 for n in range(1, 10) if f"layer0.conv{n}.weight" in keys)
    known = stem not in (1, 3) or keys["layer0.conv1.weight"].shape[-1] == (7 if stem == 1 else 3)
    for key in keys:
        owner, _, role = key.rpartition(".")
        layer = _layer_of(owner, stem) if known else None
        if layer is None or (owner.startswith("layer") and "layer1.0.conv3.weight" not in keys):
            raise ValueError(
                f"{type(model).__name__} has no original in Caffe (at {key!r}); there are those of {_KINDS}"
            )
        if role.startswith("running_"):
            layer += "/bn"
        elif re.fullmatch(r".*(bn\d?|downsample\.1)", owner):
            layer += "/bn/scale"
        names.setdefault(layer, []).append(key)
    order = ("weight", "running_mean", "bias", "running_var")
    return {layer: tuple(sorted(of, key=lambda k: order.index(k.rpartition(".")[2]))) for layer, of in names.items()}


def load_caffe(
    model: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Any], strict: bool = True, *, rgb: bool = False
) -> CaffeResult:
    """Loads the weights of the original Caffe network of a model, in place; returns what was missing and unexpected.

    Where Caffe runs, this writes a file of the kind that is read here::

        net = caffe.Net("SENet-154.prototxt", "SENet.caffemodel", caffe.TEST)
        blobs = {f"{name}/{i}": blob.data for name, of in net.params.items() for i, blob in enumerate(of)}
        numpy.savez("senet154.npz", **blobs)

    Args:
        model: a network that :func:`caffe_names` knows, with any SE layers.
        weights: the path of such an .npz, or a mapping such as one, or ``net.params`` itself. Keys are names of layers,
            with a list of blobs (or the one that there is), or of single blobs: the layer's name, one of ``/ _ . :``
            and the blob's number. Blobs are arrays or tensors in Caffe's order: of a convolution or an inner product
            weight and bias; of a BatchNorm mean, variance and the factor to divide them by (0: they are 0); of a Scale
            weight and bias. Shapes may differ in dimensions of 1. Layers without blobs are ignored. A convolution that
            has a bias here and none there, in front of a BatchNorm, gets zeros.
        strict: whether the layers have to be exactly those of the model. If not, what is missing stays as it is.
        rgb: turns the input channels of the first convolution around, so that the model takes RGB instead of BGR.

    The loaded model takes images as Caffe does: float, 0 to 255, minus the mean of each channel, not divided by a
    standard deviation. The planes are BGR minus (104, 117, 123), with ``rgb`` RGB minus (123, 117, 104)::

        x = image_rgb.float() - torch.tensor([123.0, 117.0, 104.0])[:, None, None]    # [3, H, W], 0 to 255, rgb=True

    Caffe's BatchNorms add the same 1e-5 to the variance as torch.nn's, and keep the variance with Bessel's correction,
    too. The published networks were to be run with ``model.eval()``: their prototxts fix all statistics.

    Raises:
        ValueError: no original in Caffe; missing or unexpected layers with ``strict``; blobs of another number or
            shape; a file that is not an .npz of plain arrays; rgb for images of other than 3 channels; a model on the
            meta device. The message lists the first few. The model is then as it was.
    """
    tensors, names = _tensors(model), caffe_names(model)
    if any(t.is_meta for t in tensors.values()):
        raise ValueError("load_caffe: the model is on the meta device; call its to_empty(device=...) before")
    layers = _grouped(_opened(weights), names)
    result = CaffeResult([name for name in names if name not in layers], [name for name in layers if name not in names])
    problems = []
    if strict:
        problems += [f"{name}: expected {_expected(name, names, tensors)}, found nothing" for name in result.missing]
        problems += [f"{name}: expected no such layer, found {len(layers[name])} blobs" for name in result.unexpected]
    values = {}
    for name in (name for name in names if name in layers):
        blobs = [_as_tensor(name, blob) for blob in layers[name]]
        read = _read(name, blobs, names, tensors)
        if read is None:
            found = ", ".join(str(list(blob.shape)) for blob in blobs)
            problems.append(f"{name}: expected {_expected(name, names, tensors)}, found {found}")
        else:
            values |= read
    first = next(iter(names.values()))[0]
    if rgb and tensors[first].shape[1] != 3:
        problems.append(f"rgb=True: expected a first convolution of 3 channels, found {list(tensors[first].shape)}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        raise ValueError(f"load_caffe: these weights are not those of this {type(model).__name__}:{lines}{more}")
    if rgb and first in values:
        values[first] = values[first].flip(1)
    with torch.no_grad():
        for key, value in values.items():
            tensors[key].copy_(value)
    return result


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}".lstrip("."): t
        for prefix, module in model.named_modules()
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None and name != "num_batches_tracked"
    }


def _layer_of(owner: str, stem: int) -> str | None:
    """The Caffe layer whose output a module computes, or normalises; None for no such module."""
    if owner == "last_linear":
        return "classifier"
    if match := _IN_STEM.fullmatch(owner):
        return dict(enumerate(_STEMS.get(stem, ()), 1)).get(int(match[1]))
    if match := _IN_BLOCK.fullmatch(owner):
        stage, place, module = match.groups()
        return f"conv{int(stage) + 1}_{int(place) + 1}_{_BLOCK[module]}" if module in _BLOCK else None
    if match := _IN_INCEPTION.fullmatch(owner):
        inception, module, _ = match.groups()
        if module in ("se.fc1", "se.fc2"):
            return f"{inception}_1x1_{'down' if module == 'se.fc1' else 'up'}"
        return f"{inception}/{_INCEPTION.get(module, module)}" if "." not in module else None
    return None


def _opened(weights: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, str | os.PathLike):
        raise ValueError(f"load_caffe: weights must be a mapping or the path of an .npz, got {type(weights).__name__}")
    try:
        # Never with pickles, which run what they like.
        with np.load(weights, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load_caffe: {os.fspath(weights)!r} is not an .npz of plain arrays; its docstring says how to write one"
        ) from error


def _grouped(weights: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, list[Any]]:
    """The blobs of each layer that has some, from keys of layers and keys of blobs."""
    layers: dict[str, dict[int, Any]] = {}
    for key, value in weights.items():
        blobs, match = _blobs_of(value), _BLOB.fullmatch(key)
        name, found = key, dict(enumerate(blobs))
        if key not in names and match is not None and _is_blob(value):
            name, found = match[1], {int(match[2]): value}
        layer = layers.setdefault(name, {})
        if twice := layer.keys() & found.keys():
            raise ValueError(f"load_caffe: blob {min(twice)} of {name} is there twice, the second time as {key!r}")
        layer |= found
    for name in names:
        if (numbers := sorted(layers.get(name, ()))) != list(range(len(numbers))):
            raise ValueError(f"load_caffe: {name} has blobs {numbers}; expected 0, 1, ... without gaps")
    return {name: [blobs[number] for number in sorted(blobs)] for name, blobs in layers.items() if blobs}


def _is_blob(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype != object
    return isinstance(value, Tensor) or hasattr(value, "data")  # pycaffe's Blob


def _blobs_of(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 0:
        value = value.item()
    return list(value) if not _is_blob(value) and isinstance(value, Iterable) else [value]


def _as_tensor(name: str, blob: Any) -> Tensor:
    if isinstance(blob, Tensor):
        return blob.detach().cpu()
    array = np.asarray(blob if isinstance(blob, np.ndarray) else getattr(blob, "data", blob))
    if array.dtype.kind not in "fiu":
        raise ValueError(f"load_caffe: {name} has a blob of {array.dtype}; expected numbers")
    return torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype.itemsize > 4 else np.float32))


def _read(
    name: str, blobs: list[Tensor], names: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The values of a layer's keys; None if its blobs are of another number or shape."""
    keys = names[name]
    if name.endswith("/bn"):
        if len(blobs) != 3 or blobs[2].numel() != 1:
            return None
        factor = float(blobs[2])
        blobs = [blob.double() * (1 / factor if factor else 0.0) for blob in blobs[:2]]
    elif len(blobs) == 1 and len(keys) == 2 and f"{name}/bn" in names:
        blobs = [*blobs, torch.zeros(tensors[keys[1]].shape)]
    if len(blobs) != len(keys):
        return None
    values = {}
    for key, blob in zip(keys, blobs, strict=True):
        shape = tensors[key].shape
        if [n for n in blob.shape if n != 1] != [n for n in shape if n != 1]:
            return None
        values[key] = blob.reshape(shape)
    return values


def _expected(name: str, names: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> str:
    shapes = [str(list(tensors[key].shape)) for key in names[name]]
    if name.endswith("/bn"):
        return ", ".join([*shapes, "[1]"])
    return f"{shapes[0]} (perhaps {shapes[1]})" if f"{name}/bn" in names and len(shapes) == 2 else ", ".join(shapes)
