"""Fill a stage's parameters from a Hugging Face folder, or with numbers that look like weights.

Each rank reads only its slices of only its layers' tensors.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from gllm.runtime.layers.sharded import Part, Sharded
from gllm.runtime.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from gllm.runtime.models.stage import StageModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("BF16", "F16", "F32", "F64")


class _TensorFile(Protocol):
    """What is used of an open safetensors file; the package has no types."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> Any: ...  # noqa: ANN401 - as above


class Wanted(NamedTuple):
    """A slice of a checkpoint's tensor, and where it goes."""

    name: str
    full_shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether this rank holds nothing of the tensor (the padded end of a vocabulary)."""
        return self.target.numel() == 0


def load_weights(model: StageModel, path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Read a stage's weights from model.safetensors, or from the files that model.safetensors.index.json lists.

    Args:
        model: the stage; its parameters are overwritten.
        path: the model's folder.
        progress: called with the number of tensors read and their total, after each.

    Raises:
        ValueError: the folder or a file is missing or broken; a tensor is missing, has another shape, is quantised,
            or is one that this architecture has no place for; one line that names it.
    """
    checkpoint = open_checkpoint(path)
    _reject_unknown(model, checkpoint)
    wanted = [each for each in wanted_tensors(model) if not each.is_empty]
    by_file: dict[Path, list[Wanted]] = {}
    for each in wanted:
        by_file.setdefault(checkpoint.file_of(each.name), []).append(each)
    num_read = 0
    for file, those in by_file.items():
        with _opened(file) as tensors:
            for each in those:
                _read(tensors, each, file)
                num_read += 1
                if progress is not None:
                    progress(num_read, len(wanted))


def fill_with_dummy_weights(model: StageModel, *, seed: int = 0) -> None:
    """Fill a stage with numbers that depend on the seed, a tensor's name and the place in the whole tensor alone.

    However a model is cut, and on whatever device, its weights are the same, and each rank computes only its own.
    Of a model with experts, what attention adds is scaled by 1 / sqrt(2 * layers), as GPT-2's layers begin: unscaled,
    the tokens of a sequence grow alike from layer to layer (arXiv 2103.03404), until the same few experts take them
    all; a trained router's load is balanced.
    """
    gain, after_attention = (2 * model.config.shape.num_layers) ** -0.5, set[str]()
    if model.config.shape.is_moe:
        after_attention = {f"{model.checkpoint_name(f'layers.{layer}.attention.out')}.weight" for layer in model.layers}
    for each in wanted_tensors(model):
        if not each.is_empty:
            _fill(each, zlib.crc32(f"{seed}:{each.name}".encode()))
            if each.name in after_attention:
                each.target.mul_(gain)


def wanted_tensors(model: StageModel) -> Iterator[Wanted]:
    """Everything that a stage's parameters are filled with."""
    for path, module in model.named_modules():
        if isinstance(module, Sharded):
            for parameter, parts in module.parts.items():
                yield from _wanted_by(model, path, parameter, parts, module.get_parameter(parameter))


def _wanted_by(
    model: StageModel, path: str, parameter: str, parts: tuple[Part, ...], tensor: Tensor
) -> Iterator[Wanted]:
    """What one parameter wants; parts that a checkpoint keeps in one tensor lie one after the other in it."""
    names = [f"{model.checkpoint_name(f'{path}.{part.name}'.rstrip('.'))}.{parameter}" for part in parts]
    num_rows: Counter[str] = Counter()
    for name, part in zip(names, parts, strict=True):
        num_rows[name] += part.full_shape[0]
    offsets: Counter[str] = Counter()
    for name, part in zip(names, parts, strict=True):
        first, *rest = part.source
        source = (slice(first.start + offsets[name], first.stop + offsets[name]), *rest)
        offsets[name] += part.full_shape[0]
        yield Wanted(name, (num_rows[name], *part.full_shape[1:]), source, tensor.data[part.target])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which file of a folder holds which tensor."""

    folder: Path
    files: Mapping[str, Path]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor.

        Raises:
            ValueError: none does.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder}: the checkpoint has no tensor {name!r}, which its config.json calls for")
        return self.files[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find a folder's tensors, reading no weights.

    Raises:
        ValueError: no such folder, no safetensors in it, or a file that the index lists is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model {str(path)!r}: no such folder; give a Hugging Face model folder")
    if (folder / _INDEX).is_file():
        return Checkpoint(folder, _read_index(folder))
    if (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as tensors:
            return Checkpoint(folder, dict.fromkeys(tensors.keys(), folder / _SINGLE))
    hint = "; convert pytorch_model.bin to safetensors" if any(folder.glob("*.bin")) else ""
    raise ValueError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there{hint} (or --load-format dummy)")


def _read_index(folder: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / _INDEX}: not an index (JSON with a weight_map); fetch the model again") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise ValueError(f"{file}: listed in {_INDEX} but missing; fetch the model again")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[_TensorFile]:
    """An open safetensors file; what is wrong with it becomes one line."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error})") from None


def _read(tensors: _TensorFile, wanted: Wanted, file: Path) -> None:
    """Read one slice into its place."""
    whole = tensors.get_slice(wanted.name)
    if tuple(whole.get_shape()) != wanted.full_shape:
        raise ValueError(
            f"{file}: tensor {wanted.name!r} has shape {list(whole.get_shape())}, "
            f"the model's config.json calls for {list(wanted.full_shape)}"
        )
    if whole.get_dtype() not in _FLOATS:
        raise ValueError(f"{file}: tensor {wanted.name!r} is {whole.get_dtype()}; quantised weights are not supported")
    wanted.target.copy_(whole[wanted.source])


def _reject_unknown(model: StageModel, checkpoint: Checkpoint) -> None:
    """Refuse tensors that no rank would read: the model would not be what its file says.

    What the whole model wants is known from one that holds every layer, on the device that stores nothing.
    """
    config = model.config
    whole = type(model)(config, Shard(layers=range(config.shape.num_layers)), dtype=model.dtype, device="meta")
    known = {each.name for each in wanted_tensors(whole)}
    if config.tie_word_embeddings:
        known.add(f"{model.names['head']}.weight")  # some checkpoints hold the tied matrix twice
    unknown = sorted(name for name in checkpoint.files if name not in known and not _is_ignored(model, name))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(f"{checkpoint.folder}: tensor {unknown[0]!r}{more} has no place in {config.architecture}")


def _is_ignored(model: StageModel, name: str) -> bool:
    generic = ".".join("*" if word.isdigit() else word for word in name.split("."))
    return generic in model.ignored


_MAX_BLOCK = 1 << 22  # numbers made at a time, to bound the memory of their 64-bit hashes


def _fill(wanted: Wanted, seed: int) -> None:
    """Fill one slice: uniform with variance 1 / fan-in, norms around one, biases small."""
    rows, *columns = wanted.source
    column = columns[0] if columns else slice(0, 1)
    width = wanted.full_shape[1] if columns else 1
    places = torch.arange(column.start, column.stop, device=wanted.target.device)
    target = wanted.target if columns else wanted.target[:, None]
    step = max(1, _MAX_BLOCK // len(places))
    for start in range(0, len(target), step):
        block = target[start : start + step]
        numbers = torch.arange(rows.start + start, rows.start + start + len(block), device=block.device)
        noise = _noise(numbers[:, None] * width + places, seed)
        block.copy_(_scaled(noise, wanted))


def _scaled(noise: Tensor, wanted: Wanted) -> Tensor:
    if len(wanted.full_shape) > 1:
        return noise * math.sqrt(3 / wanted.full_shape[-1])
    return noise * 0.1 + (0.0 if wanted.name.endswith(".bias") else 1.0)


def _noise(index: Tensor, seed: int) -> Tensor:
    """A number in [-1, 1) for each index: a hash, so that any slice can be computed alone."""
    return (_mixed(_mixed(index & _LOW) ^ seed).to(torch.float32) * 2.0**-31) - 1.0


_LOW = 0xFFFFFFFF


def _mixed(bits: Tensor) -> Tensor:
    """A bijection of 32-bit numbers: multiply, xor with a shift (splitmix and murmur finish the same way)."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & _LOW
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _LOW
    return bits ^ (bits >> 16)
