"""The run directory: identity, refusal, atomic writes, round trips."""

import errno
import json
import os

import pandas as pd
import pytest
import torch

from moe_lens.capture import store
from moe_lens.capture.run import create_run, open_run
from moe_lens.errors import BadOutput, WriteFailed

IDENTITY = {"model": {"name": "m"}, "corpus": {"id": "c"}, "seed": 0}


def test_a_run_keeps_tables_and_manifest(tmp_path):
    run = create_run(tmp_path / "a", IDENTITY)
    frame = pd.DataFrame({"layer": [0], "neurons": [[1, 2]], "f1": [0.5]})
    run.write("probe", frame)
    run.update_manifest(commands={"probe": {"state": "done"}})
    again = open_run(tmp_path / "a")
    assert again.frame("probe").neurons[0].tolist() == [1, 2]
    assert again.manifest["commands"]["probe"]["state"] == "done"
    assert again.manifest["model"] == {"name": "m"}
    assert {"schema_version", "packages", "prompts", "command_line"} <= set(again.manifest)
    assert set(again.tables()) == {"probe"}


def test_the_same_identity_is_reopened_and_another_is_refused(tmp_path):
    create_run(tmp_path, IDENTITY).write("probe", pd.DataFrame({"a": [1]}))
    assert create_run(tmp_path, IDENTITY).has("probe")
    with pytest.raises(BadOutput, match="--resume"):
        create_run(tmp_path, {**IDENTITY, "seed": 1})
    assert open_run(tmp_path).has("probe")


def test_dropping_a_command_leaves_the_others_alone(tmp_path):
    run = create_run(tmp_path, IDENTITY)
    for command in ("probe", "autointerp"):
        run.write(command, pd.DataFrame({"a": [1]}))
        run.partial(command).mkdir(parents=True)
        run.update_manifest(commands={command: {"state": "done"}})
    run.drop("probe", ["probe.parquet", "probe.html"])
    assert not run.has("probe")
    assert run.has("autointerp")
    assert list(run.manifest["commands"]) == ["autointerp"]
    assert not run.partial("probe").exists()
    assert run.partial("autointerp").exists()
    run.drop("autointerp", [])
    assert not (tmp_path / ".partial").exists()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadOutput, match="not empty"):
        create_run(tmp_path, IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadOutput, match="not a run directory"):
        open_run(tmp_path)


def test_a_missing_table_names_the_ones_there(tmp_path):
    run = create_run(tmp_path, IDENTITY)
    run.write("probe", pd.DataFrame({"a": [1]}))
    with pytest.raises(BadOutput, match="it has: probe"):
        run.frame("labels")


@pytest.mark.parametrize("kind", ["table", "json", "state"])
def test_a_full_disk_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch, kind):
    path = tmp_path / "x"
    write, value = {
        "table": (store.write_table, pd.DataFrame({"a": [1]})),
        "json": (store.write_json, {"a": 1}),
        "state": (store.write_state, {"a": torch.ones(2)}),
    }[kind]
    write(path, value)
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(WriteFailed, match="disk is full"):
        write(path, value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_really_full_device_is_reported(tmp_path):
    with pytest.raises(WriteFailed, match="could not write"):
        store.write_json(tmp_path / "f" / "x.json", {}) if (tmp_path / "f").write_text("file") else None


def test_results_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        store.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


def test_state_round_trips(tmp_path):
    state = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    store.write_state(tmp_path / "s", state)
    read = store.read_state(tmp_path / "s")
    assert all(torch.equal(state[k], read[k]) for k in state)


def test_manifest_is_plain_json(tmp_path):
    create_run(tmp_path, IDENTITY)
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 0
