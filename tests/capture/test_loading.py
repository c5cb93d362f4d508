"""Bad input of loading: each one clear line with place, finding and remedy, and nothing random in the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import toys
from vlmopt.capture.loading import load_model, resolve_folder
from vlmopt.core.errors import ModelError

Spoil = Callable[[Path], None]
WEIGHT = "visual_projection.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    toys.make("clip").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refused(model: Path | str, *, allow_pickle: bool = False) -> str:
    """The one line that the user sees."""
    with pytest.raises(ModelError) as caught:
        load_model(str(model), allow_pickle=allow_pickle)
    line = caught.value.one_line()
    assert "\n" not in line
    assert "Traceback" not in line
    assert len(line) < 700
    return line


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, Path]:
    """Two shards with an index, as large models are stored."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    paths: dict[str, Path] = {}
    weight_map: dict[str, str] = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
        paths[name] = folder / name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_whole_folder_loads_in_evaluation_mode_with_its_own_numbers(folder: Path) -> None:
    model, source, place = load_model(str(folder))
    assert not model.training
    assert place == folder
    assert (source.model_type, source.architecture, source.path) == ("clip", "CLIPModel", str(folder))
    assert torch.equal(model.state_dict()[WEIGHT], load_file(folder / "model.safetensors")[WEIGHT])
    again = load_model(str(folder))[1].fingerprint
    assert source.fingerprint == again
    edit_weights(folder, lambda tensors: tensors[WEIGHT].add_(1e-3))
    assert load_model(str(folder))[1].fingerprint != again


def test_sharded_weights_load_and_a_missing_shard_is_named(folder: Path) -> None:
    paths = shard(folder)
    load_model(str(folder))
    second = list(paths.values())[1]
    second.unlink()
    assert refused(folder) == (f"{second}: is missing; expected the shard that the index names; fetch it again")


def test_a_folder_that_is_not_there_or_is_a_file_is_named(tmp_path: Path) -> None:
    missing, file = tmp_path / "nowhere", tmp_path / "model.bin"
    file.write_bytes(b"")
    wanted = "expected a Hugging Face model folder (config.json beside model.safetensors)"
    assert refused(missing) == f"{missing}: no such folder; {wanted}"
    assert refused(file) == f"{file}: is a file; {wanted}"
    assert "no such folder" in refused("just-a-word")


def test_a_hub_id_that_cannot_be_fetched_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = refused("someone/some-model")
    assert line.startswith(
        "someone/some-model: neither a folder nor a model that could be fetched from the hub (OSError)"
    )
    assert line.endswith("check the id and the network")
    assert resolve_folder(".") == Path()


def test_a_folder_without_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refused(folder) == f"{folder}: has no config.json; expected a Hugging Face model folder"


@pytest.mark.parametrize("text", ["{not json", "", "\ufeff{", '{"model_type": "clip"'])
def test_a_config_that_is_no_json_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    line = refused(folder)
    assert line.startswith(f"{folder / 'config.json'}: is not JSON (")
    assert line.endswith("fetch the model again")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"model_type": "clipp"}', "model_type 'clipp' cannot be read by transformers"),
        ("{}", "model_type None cannot be read by transformers"),
        ("[1, 2]", "model_type None cannot be read by transformers"),
        ('"clip"', "model_type None cannot be read by transformers"),
    ],
)
def test_a_config_of_an_unknown_model_is_refused(folder: Path, text: str, found: str) -> None:
    (folder / "config.json").write_text(text)
    line = refused(folder)
    assert line.startswith(f"{folder / 'config.json'}: {found}")
    assert line.endswith("check model_type, or upgrade transformers")


@pytest.mark.parametrize("name", ["CLIPPModel", "AutoConfig", "logging", "CLIPConfig"])
def test_an_architecture_that_is_no_model_is_refused(folder: Path, name: str) -> None:
    edit_config(folder, architectures=[name])
    line = refused(folder)
    assert f"config.json: architecture '{name}' is unknown to transformers" in line


def test_without_architecture_the_plain_model_of_the_type_is_taken(folder: Path) -> None:
    edit_config(folder, architectures=None)
    assert load_model(str(folder))[1].architecture == "CLIPModel"


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder) == f"{folder}: has no weights; expected model.safetensors beside config.json"


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    n = int(kept if kept >= 1 or kept == 0 else len(content) * kept)
    path.write_bytes(content[:n])
    line = refused(folder)
    assert line.startswith(f"{path}: is truncated or no safetensors file ({n} bytes: ")
    assert line.endswith("fetch the file again")


def test_a_truncated_shard_is_named(folder: Path) -> None:
    path = list(shard(folder).values())[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(folder).startswith(f"{path}: is truncated")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "{}", '"x"'])
def test_an_index_that_is_none_is_named(folder: Path, text: str) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refused(folder) == f"{index}: is not a safetensors index; fetch the model again"


def test_a_pickle_is_refused_unless_asked_for(folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    pickled(folder)
    line = refused(folder)
    assert line.startswith(f"{folder / 'pytorch_model.bin'}: is a pickle, which can run any code when it is loaded")
    assert "expected model.safetensors" in line
    assert "--allow-pickle" in line
    model = load_model(str(folder), allow_pickle=True)[0]
    assert torch.equal(model.state_dict()[WEIGHT], wanted[WEIGHT])


def test_a_corrupt_pickle_is_named(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    line = refused(folder, allow_pickle=True)
    assert line.startswith(f"{folder / 'pytorch_model.bin'}: cannot be loaded into CLIPModel (")


def test_a_pickle_that_would_run_code_is_not_run_even_if_asked_for(folder: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.write_text, (tmp_path / "ran", "yes")  # type: ignore[return-value]

    pickled(folder)
    torch.save({"x": Runs()}, folder / "pytorch_model.bin")
    refused(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_missing_tensors_would_be_random_and_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:5]])
    line = refused(folder)
    assert line.startswith(f"{folder / 'model.safetensors'}: lacks 5 tensors of CLIPModel (")
    assert ", ...)" in line
    assert line.endswith("they would be random: use the weights that belong to config.json")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 5)}))
    assert refused(folder).startswith(
        f"{folder / 'model.safetensors'}: has other shapes for 1 tensors of CLIPModel ({WEIGHT} (3, 5) for (16, 32))"
    )


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks" in refused(folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "nope"), ("hidden_size", 33)])
def test_a_config_that_no_model_can_be_built_from_is_one_line_too(folder: Path, key: str, value: object) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, vision_config={**config["vision_config"], key: value})
    assert str(value) in refused(folder) or "multiple" in refused(folder) or "divisible" in refused(folder)
    with pytest.raises(ModelError, match="nope|33|divisible|multiple"), FakeTensorMode():
        load_model(str(folder), with_weights=False)
    assert torch.get_default_dtype() is torch.float32
