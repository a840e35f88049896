"""The one loader of encoders: teachers, evaluated models, models to fine-tune, exports that are checked or trimmed.

In: a directory or hub name. Out: a complete encoder in fp32. All its weights are in the files, and the files hold no
weight that it does not use. Otherwise a `UserError` names the model, the cause and the fix. No code of a model runs:
`trust_remote_code` is False everywhere, because transformers asks at the terminal where it is not given.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel

from data_prep.command_line import is_verbose
from pipeline.distillation.models.architectures import architecture_of
from pipeline.distillation.models.model_config import (
    CONFIG_FILE,
    ModelName,
    check_no_lfs_pointer,
    one_line,
    read_config,
)
from pipeline.distillation.models.model_files import ModelFiles, encoder_name, find_directory, is_ignored, read_model
from pipeline.errors import UserError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FETCH = "Its config.json and its weights do not belong together, or one of them is corrupt: fetch both again"


def load_encoder(name_or_path: str | Path, role: str = "teacher") -> PreTrainedModel:
    """Load the complete encoder of a directory or hub name, without pooler or head: fp32, eval mode, on the CPU.

    `role` is what messages call it. Raises `UserError` if it cannot be loaded, or a weight is missing, left over, of
    another shape or not finite.
    """
    files = read_model(name_or_path, role)
    config = config_of(files.directory / CONFIG_FILE, files.model.name, role)
    check_weights(files, config)
    try:
        with _quiet():  # what transformers would report is checked below
            model, loaded = AutoModel.from_pretrained(
                str(files.directory),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_no_pooler(config),
            )
    except Exception as error:  # of many kinds: the library checks a config by using it
        raise files.model.error(f"{type(error).__name__}: {one_line(error)}", _fix_of(error)) from None
    if loaded["missing_keys"]:
        raise files.missing_weights_error(", ".join(sorted(loaded["missing_keys"])[:3]))
    _check_finite(files, model)
    model.config._name_or_path = files.model.name
    if files.directory.parent.name == "snapshots":  # the hub's cache: record the commit
        model.config._commit_hash = files.directory.name
    return model.eval()


def _no_pooler(config: PretrainedConfig) -> dict[str, bool]:
    return {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}


def _fix_of(error: Exception) -> str:
    """The fix for an error whose cause is not in the files."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "Free memory, or start fewer ranks on this machine"
    if isinstance(error, ImportError):
        return "Install the package that is named, or choose a model that needs none"
    return FETCH


def load_config(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> PretrainedConfig:
    """The config alone, with the checks of `load_encoder` on it. The arguments are those of `read_model`."""
    directory = find_directory(name_or_path, role, is_cached)
    return config_of(directory / CONFIG_FILE, str(name_or_path), role)


def config_of(path: Path, name: str, role: str) -> PretrainedConfig:
    """The checked config in a file of any name; `name` and `role` are for messages."""
    model = ModelName(name, role)
    read_config(path, model)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # each config class reports wrong types in its own way
        raise model.error(f"{path}: {type(error).__name__}: {one_line(error)}", FETCH) from None
    architecture_of(config)
    return config


def blank_model(
    config: PretrainedConfig, name: str, role: str = "teacher", attn_implementation: str | None = None
) -> PreTrainedModel:
    """The encoder of a config in fp32 with its random start, on the current device (`meta` for shapes alone).

    Raises `UserError` if the config cannot be built; `name` and `role` are for messages.
    """
    more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **_no_pooler(config), **more)
    except Exception as error:
        raise ModelName(name, role).error(f"{type(error).__name__}: {one_line(error)}", FETCH) from None


def count_parameters(module: nn.Module) -> int:
    """Number of values in a module's parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def load_tokenizer(name_or_path: str | Path, role: str = "model") -> Any:
    """The Hugging Face tokenizer of a model. Raises `UserError` if it cannot be loaded or requires code of its own."""
    model = ModelName(str(name_or_path), role)
    _check_tokenizer_files(Path(name_or_path), model)
    try:
        return AutoTokenizer.from_pretrained(model.name, trust_remote_code=False)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise model.error(
            f"no tokenizer that loads: {one_line(error)}",
            "Copy the tokenizer files of the model that it was distilled from into its directory",
        ) from None


def _check_tokenizer_files(directory: Path, model: ModelName) -> None:
    """Reject what transformers would ignore: files that git-lfs has not fetched, and code of the tokenizer's own."""
    for path in sorted(directory.glob("*")) if directory.is_dir() else ():
        if path.suffix in (".json", ".model", ".txt") and path.is_file():
            check_no_lfs_pointer(path, model)
    about = directory / TOKENIZER_CONFIG_FILE
    try:
        code = about.is_file() and json.loads(about.read_bytes()).get("auto_map")
    except (ValueError, AttributeError, RecursionError) as error:
        raise model.error(
            f"{about} is not readable JSON of a tokenizer ({one_line(error)})", "Fetch it again"
        ) from None
    if code:
        raise model.error(
            f"`auto_map` in {about} requires the tokenizer's own code, which is never run here",
            "If the architecture's own class is right for it, remove `auto_map`; otherwise choose another model",
        )


def with_head(head: Any, encoder: PreTrainedModel, name_or_path: str | Path, **settings: Any) -> Any:
    """A copy of `encoder`, loaded from `name_or_path`, under a new head, a Hugging Face auto class.

    The head starts at random, even if the files hold one. A pooler is that of the files, if they hold one. `settings`
    change the config. Raises `UserError` if the architecture has no class with this head.
    """
    config = copy.deepcopy(encoder.config)
    for key, value in settings.items():
        setattr(config, key, value)
    prefix = architecture_of(config).prefix
    weights = {**_read_pooler(name_or_path), **encoder.state_dict()}
    body = {f"{prefix}.{name}": tensor.detach().cpu().clone() for name, tensor in weights.items()}
    try:
        with _quiet():  # transformers would report the new head
            with torch.device("meta"):
                kind = type(head.from_config(config, trust_remote_code=False))
            return kind.from_pretrained(None, config=config, state_dict=body, dtype=torch.float32)
    except Exception as error:  # DeBERTa and MPNet do not have classes of every kind
        raise UserError(
            f"no {head.__name__} can be made of {name_or_path}: {one_line(error)}. Choose a task that a "
            f"{config.model_type} can be fine-tuned on"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and warnings, unless `MINILMV2_VERBOSE` asks for them."""
    if is_verbose():
        yield
        return
    verbosity, has_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()  # those of downloads


def _read_pooler(name_or_path: str | Path) -> dict[str, torch.Tensor]:
    """The pooler's weights in a model's files, in fp32; nothing if the architecture has no pooler."""
    files = read_model(name_or_path, "model")
    found = {}
    for name, tensor in files.tensors.items():
        inner = encoder_name(name, files.architecture)
        if files.architecture.has_pooler and inner.startswith("pooler."):
            with safe_open(tensor.file, framework="pt") as file:
                found[inner] = file.get_tensor(name).float()
    return found


def check_weights(files: ModelFiles, config: PretrainedConfig) -> None:
    """Raise a `UserError` unless files and config have the same tensors in the same shapes.

    Weights that are not in the files would be random. Weights that the model does not use belong to another model.
    """
    with torch.device("meta"):
        model = blank_model(config, files.model.name, files.model.role)
    kind = f"a {type(model).__name__} of its config.json"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {k: shape for k, shape in expected.items() if not is_ignored(k, files.architecture, files.config)}
    given = {name: tensor.shape for name, tensor in files.encoder_tensors().items()}
    if missing := sorted(expected.keys() - given.keys()):
        names = ", ".join(f"`{name}`" for name in missing[:3])
        raise files.missing_weights_error(f"{len(missing)} of them ({names})")
    if left_over := sorted(given.keys() - expected.keys()):
        raise files.model.error(
            f"its files hold {', '.join(f'`{name}`' for name in left_over[:3])}{' and others' * (len(left_over) > 3)}, which "
            f"{kind} does not use: it would not compute what was trained",
            "Fetch config.json and weights again. If they belong to a head of your own, save the encoder alone: "
            f"`AutoModel.from_pretrained({str(files.directory)!r}).save_pretrained('NEW_DIR')`",
        )
    for name in sorted(expected):
        if expected[name] != given[name]:
            raise files.model.error(
                f"`{name}` is {list(given[name])} in its files and {list(expected[name])} in {kind}", FETCH
            )


def _check_finite(files: ModelFiles, model: PreTrainedModel) -> None:
    """Raise a `UserError` if a weight is NaN or infinite: every loss of the run would be."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise files.model.error(
                f"it holds NaN or infinity in `{name}`: the file is corrupt or its training diverged",
                "Fetch it again or choose another one",
            )
