"""The one loader of every encoder: teachers, evaluated models, bodies that are fine-tuned, what export checks and trims.

In: a directory or hub name. Out: a whole encoder in fp32, every one of whose weights comes from the files and whose
files hold no weight that it does not use; or a `UserError` that names the model, the cause and the fix. No code of a
model is run: `trust_remote_code` is False everywhere, since transformers asks at the terminal where it is not given.
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
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel

from pipeline.distillation.models.architectures import architecture_of
from pipeline.distillation.models.model_config import CONFIG_FILE, LFS_POINTER, one_line, read_config, refusal
from pipeline.distillation.models.model_files import ModelFiles, encoder_name, find_directory, is_harmless, read_model
from pipeline.errors import UserError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FETCH = "Its config.json and its weights do not belong together, or one of them is corrupt: fetch both again"


def load_encoder(name_or_path: str | Path, role: str = "teacher") -> PreTrainedModel:
    """A whole encoder in fp32, without pooler or head, from safetensors only, in eval mode. `whose`: what messages call it."""
    files = read_model(name_or_path, role)
    config = config_of(files.directory / CONFIG_FILE, files.name, role)
    check_weights(files, config)
    pooler = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    try:
        with _quiet():  # what its report would list is looked at below
            model, loaded = AutoModel.from_pretrained(
                str(files.directory),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **pooler,
            )
    except Exception as error:  # of a dozen kinds: the library checks a config by using it
        raise files.refusal(f"{type(error).__name__}: {one_line(error)}", _fix_of(error)) from None
    if loaded["missing_keys"]:
        raise files.lacking(", ".join(sorted(loaded["missing_keys"])[:3]))
    _check_finite(files, model)
    model.config._name_or_path = files.name
    if files.directory.parent.name == "snapshots":  # of the hub's cache: which commit this was
        model.config._commit_hash = files.directory.name
    return model.eval()


def _fix_of(error: Exception) -> str:
    """Of what the files themselves do not show."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "Free memory, or start fewer ranks on this machine"
    if isinstance(error, ImportError):
        return "Install the package that is named, or choose a model that needs none"
    return FETCH


def load_config(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> PretrainedConfig:
    """The config alone, with the same checks."""
    directory = find_directory(name_or_path, role, is_cached)
    return config_of(directory / CONFIG_FILE, str(name_or_path), role)


def config_of(path: Path, name: str, role: str) -> PretrainedConfig:
    """The config in a file of any name."""
    read_config(path, name, role)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # wrong types in it are found by the class of its family, each in its own way
        raise refusal(role, name, f"{path}: {type(error).__name__}: {one_line(error)}", FETCH) from None
    architecture_of(config)
    return config


def blank_model(
    config: PretrainedConfig, name: str, role: str = "teacher", attn_implementation: str | None = None
) -> PreTrainedModel:
    """The encoder of a config on the current device, meta as a rule; what it cannot be built from is a `UserError`."""
    pooler = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **pooler, **more)
    except Exception as error:
        raise refusal(role, name, f"{type(error).__name__}: {one_line(error)}", FETCH) from None


def load_tokenizer(name_or_path: str | Path, role: str = "model") -> Any:
    """The Hugging Face tokenizer of a model."""
    _check_tokenizer_files(Path(name_or_path), str(name_or_path), role)
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise refusal(
            *(role, str(name_or_path), f"no tokenizer that loads: {one_line(error)}"),
            "Copy the tokenizer files of the model that it was distilled from beside it",
        ) from None


def _check_tokenizer_files(directory: Path, name: str, role: str) -> None:
    """What transformers would read past: code of the tokenizer's own (it takes a class of the family instead) and files
    that git-lfs has not fetched."""
    for path in sorted(directory.glob("*")) if directory.is_dir() else ():
        if path.suffix in (".json", ".model", ".txt") and path.is_file():
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise refusal(role, name, f"{path} is a Git LFS pointer", f"Run: git -C {path.parent} lfs pull")
    about = directory / TOKENIZER_CONFIG_FILE
    try:
        code = about.is_file() and json.loads(about.read_bytes()).get("auto_map")
    except (ValueError, AttributeError, RecursionError) as error:
        raise refusal(
            role, name, f"{about} is not readable JSON of a tokenizer ({one_line(error)})", "Fetch it again"
        ) from None
    if code:
        raise refusal(
            *(role, name, f"`auto_map` in {about} asks for the tokenizer's own code, which is never run here"),
            "Where the family's own class is right, take `auto_map` out; otherwise choose another model",
        )


def with_head(head: Any, encoder: PreTrainedModel, name_or_path: str | Path, **settings: Any) -> Any:
    """A copy of a loaded encoder under a new head of a Hugging Face auto class; the head is new whatever the encoder's
    files hold, a pooler is that of the files where there is one."""
    config = copy.deepcopy(encoder.config)
    for key, value in settings.items():
        setattr(config, key, value)
    prefix = architecture_of(config).prefix
    weights = {**read_pooler(name_or_path), **encoder.state_dict()}
    body = {f"{prefix}.{name}": tensor.detach().cpu().clone() for name, tensor in weights.items()}
    try:
        with _quiet():  # that the head is new is no news here
            with torch.device("meta"):
                kind = type(head.from_config(config, trust_remote_code=False))
            return kind.from_pretrained(None, config=config, state_dict=body, dtype=torch.float32)
    except Exception as error:  # DeBERTa and MPNet, say, have no class of every kind
        raise UserError(
            f"no {head.__name__} can be made of {name_or_path}: {one_line(error)}. Choose a task that a "
            f"{config.model_type} can be fine-tuned on"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def read_pooler(name_or_path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the pooler that a model's files hold, in fp32; of one whose class has none, nothing."""
    files = read_model(name_or_path, "model")
    found = {}
    for name, tensor in files.tensors.items():
        inner = encoder_name(name, files.family)
        if files.family.has_pooler and inner.startswith("pooler."):
            with safe_open(tensor.file, framework="pt") as file:
                found[inner] = file.get_tensor(name).float()
    return found


def check_weights(files: ModelFiles, config: PretrainedConfig) -> None:
    """Weights that are not in the files would be random; weights that the model leaves over belong to another model; one
    of another shape fits nowhere."""
    with torch.device("meta"):
        model = blank_model(config, files.name, files.role)
    kind = f"a {type(model).__name__} of its config.json"
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: shape for name, shape in wanted.items() if not is_harmless(name, files.family, files.config)}
    given = {name: tensor.shape for name, tensor in files.encoder_tensors().items()}
    if lacking := sorted(wanted.keys() - given.keys()):
        raise files.lacking(f"{len(lacking)} of them ({', '.join(f'`{name}`' for name in lacking[:3])})")
    if left_over := sorted(given.keys() - wanted.keys()):
        raise files.refusal(
            f"its files hold {', '.join(f'`{name}`' for name in left_over[:3])}{' and others' * (len(left_over) > 3)}, which "
            f"{kind} does not use: it would not compute what was trained",
            "Fetch config.json and weights again. Where they belong to a head of your own, save the encoder alone: "
            f"`AutoModel.from_pretrained({str(files.directory)!r}).save_pretrained('NEW_DIR')`",
        )
    for name in sorted(wanted):
        if wanted[name] != given[name]:
            raise files.refusal(
                f"`{name}` is {list(given[name])} in its files and {list(wanted[name])} in {kind}", FETCH
            )


def _check_finite(files: ModelFiles, model: PreTrainedModel) -> None:
    """NaN and infinity would be the run's from its first step."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise files.refusal(
                f"it holds NaN or infinity in `{name}`: the file is corrupt or its training diverged",
                "Fetch it again or choose another one",
            )
