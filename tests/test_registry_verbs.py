"""The registry on the command line, through its parser: what is printed, what is refused, what status comes back."""
# ruff: noqa: F401, F811 (`make` is a fixture)

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_gate import Make, make

from eurosat_mlops.core import EurosatError
from eurosat_mlops.registry import Registry
from eurosat_mlops.registry_verbs import add_registry, format_table, run_registry

Say = Callable[..., str]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    "Runs a verb in a project of its own and gives what it printed."
    (tmp_path / "settings.ini").write_text("[eurosat]\nregistry = store\ngate_latency_ms = 1000\n")
    monkeypatch.chdir(tmp_path)

    def one(*words: str | Path, status: int = 0) -> str:
        parser = argparse.ArgumentParser()
        add_registry(parser)
        assert run_registry(parser.parse_args([str(word) for word in words])) == status
        return capsys.readouterr().out

    return one


def promote(say: Say, ref: str, alias: str = "production", *more: str) -> str:
    return say("promote", ref, alias, "--why", "it is time", "--who", "release team", *more)


def test_a_version_is_kept_listed_and_shown(say: Say, make: Make, tmp_path: Path) -> None:
    bundle = make()
    assert say("list").split() == ["version", "created", "model", "data", "accuracy", "%", "on", "aliases"]
    assert say("add", bundle.folder) == f"{bundle.id}\n"
    assert say("add", bundle.folder.name) == f"{bundle.id} is kept already\n", "a path counts from where one is"
    promote(say, bundle.id[:8], "staging")
    head, row = say("list").splitlines()
    assert row.startswith(bundle.id[:12]) and row.endswith("staging") and "95.00  test, random" in row
    assert head.index("accuracy %") + len("accuracy %") == row.index("95.00") + 5
    shown = say("show", bundle.id[:9])
    assert bundle.id in shown and "test, random   2000       95.00  94.00  96.00" in shown and "it is time" in shown
    assert "signed   no" in shown


def test_what_a_bundle_says_is_text_and_no_command_to_the_terminal(say: Say, make: Make) -> None:
    bundle = make(config={"arch": "tile\x1b[2Jnet\x07"})
    say("add", bundle.folder)
    for words in (("list",), ("show", bundle.id)):
        assert "tile?[2Jnet?" in say(*words)


def test_a_run_is_added_by_its_folder(say: Say, make: Make, tmp_path: Path) -> None:
    bundle = make()
    (tmp_path / "run").mkdir()
    bundle.folder.rename(tmp_path / "run" / "bundle")
    assert say("add", "run") == f"{bundle.id}\n"


def test_promote_shows_the_checks_and_rollback_undoes_it(say: Say, make: Make) -> None:
    first, second = make(), make(range(60))
    for bundle in (first, second):
        say("add", bundle.folder)
    said = promote(say, first.id)
    assert said.endswith(f"production names {first.id}\n") and said.count("ok    ") == 8
    promote(say, second.id[:10])
    assert say("rollback", "production", "--why", "rivers", "--who", "on call") == f"production names {first.id}\n"
    moves = say("show", "production").splitlines()[-3:]
    assert [line.split()[:3] for line in moves] == [
        ["1", "production", "promote"],
        ["2", "production", "promote"],
        ["3", "production", "rollback"],
    ]


def test_a_waiver_is_given_by_name_and_shown(say: Say, make: Make) -> None:
    first, worse = make(), make(range(200))
    for bundle in (first, worse):
        say("add", bundle.folder)
    promote(say, first.id)
    with pytest.raises(EurosatError, match="accuracy"):
        promote(say, worse.id)
    promote(say, worse.id, "production", "--waive", "accuracy", "--test", "test, random")
    assert "it is time (waived: accuracy)" in say("show", "production")


def test_without_a_name_the_account_of_this_machine_decides(
    say: Say,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make()
    say("add", bundle.folder)
    monkeypatch.setenv("LOGNAME", "ada")
    say("promote", bundle.id, "candidate", "--why", "try")
    assert Registry(str(tmp_path / "store"), tmp_path).history("candidate")[0].who == "ada"


def test_verify_says_what_is_wrong_and_add_mends_it(say: Say, make: Make, tmp_path: Path) -> None:
    bundle = make()
    say("add", bundle.folder)
    assert say("verify") == "1 version, all well\n"
    kept = tmp_path / "store" / "versions" / bundle.id / "weights.safetensors"
    kept.chmod(0o644)
    kept.write_bytes(b"other")
    assert "weights.safetensors differs" in say("verify", status=1)
    say("add", bundle.folder)
    assert say("verify") == "1 version, all well\n"
    (kept.parent / "bundle.json").chmod(0o644)
    (kept.parent / "bundle.json").write_text("{}")
    assert "damaged: eurosat registry verify" in say("list")


def test_gc_says_what_is_gone(say: Say, make: Make) -> None:
    first, second = make(), make(range(60))
    for bundle in (first, second):
        say("add", bundle.folder)
    promote(say, first.id)
    assert say("gc") == "0 removed, 2 kept\n"
    assert say("gc", "--days", "0") == f"{second.id}\n1 removed, 1 kept\n"


def test_versions_travel_between_registries(say: Say, make: Make, tmp_path: Path) -> None:
    bundle = make()
    say("add", bundle.folder)
    promote(say, bundle.id)
    assert say("push", "production", "elsewhere") == f"{bundle.id}\n"
    assert (tmp_path / "elsewhere" / "versions" / bundle.id).is_dir()
    assert say("--registry", "third", "pull", "elsewhere", bundle.id[:8]) == f"{bundle.id}\n"
    assert bundle.id[:12] in say("--registry", "third", "list")
    with pytest.raises(EurosatError, match="which version"):
        say("pull", "elsewhere")


def test_wandb_names_go_to_the_mirror(say: Say, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("EUROSAT_WANDB", "offline")
    bundle = make()
    say("add", bundle.folder)
    with pytest.raises(EurosatError, match="may not be pulled"):
        say("pull", "wandb:acme/maps/land-cover")
    with pytest.raises(EurosatError, match="needs online"):
        say("push", bundle.id, "wandb:land-cover")


def test_a_version_is_signed(say: Say, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("model_signing", reason="signing is an extra: pip install 'eurosat-mlops[sign]'")
    from eurosat_mlops.signing import make_key_pair

    private, public = make_key_pair(tmp_path / "keys", password="correct horse")
    bundle = make()
    say("add", bundle.folder)
    monkeypatch.setenv("EUROSAT_REGISTRY_KEY", str(public))
    with pytest.raises(EurosatError, match="not signed"):
        promote(say, bundle.id)
    monkeypatch.setenv("EUROSAT_KEY_PASSWORD", "correct horse")
    assert say("sign", bundle.id[:8], "--key", private) == f"{bundle.id} is signed\n"
    assert "signed   yes" in say("show", bundle.id) and "signature" in promote(say, bundle.id)


@pytest.mark.parametrize(
    "words",
    [
        ["promote", "candidate", "production"],
        ["promote", "x", "live", "--why", "y"],
        ["rollback", "production"],
        *(["gc", "--days", "soon"], ["show"], ["sign", "x"], ["burn"], []),
    ],
)
def test_words_that_make_no_sense_end_with_status_2(words: list[str], say: Say) -> None:
    with pytest.raises(SystemExit) as stopped:
        say(*words)
    assert stopped.value.code == 2


def test_a_table_is_text_that_lines_up() -> None:
    table = format_table(["a", "number"], [["long name\nin two lines", "1.5"], ["b", "10"]])
    assert table.splitlines() == [
        "a                       number",
        "long name in two lines     1.5",
        "b                           10",
    ]
    assert format_table(["a", "b"], []) == "a  b" and json.dumps(table).count("\\n") == 2
