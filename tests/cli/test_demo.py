"""What ``moe-lens demo`` makes of a finished demo: shown, refused as underpowered, or put aside."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest

import moe_lens
from moe_lens.cli import demo, render_demo
from moe_lens.errors import Underpowered


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A demo whose tables nobody reads; what is left is what `show` decides."""

    def make(verdicts):
        trial = SimpleNamespace(verdicts=pd.DataFrame({"verdict": verdicts}))
        run = SimpleNamespace(frame=lambda name: None)
        for name, value in (("Probes", None), ("Labels", None), ("Trial", trial)):
            monkeypatch.setitem(moe_lens.__dict__, name, SimpleNamespace(of=lambda run, value=value: value))
        monkeypatch.setitem(moe_lens.__dict__, "open_run", lambda path: run)
        monkeypatch.setitem(moe_lens.__dict__, "report", lambda run: tmp_path / "report.html")
        monkeypatch.setattr(render_demo, "demo", lambda *_, **__: None)
        return tmp_path

    return make


def test_a_demo_with_more_than_half_of_its_labels_underpowered_fails(finished, capsys):
    folder = finished(["underpowered"] * 9 + ["supported"] * 7)
    with pytest.raises(Underpowered, match="56% of the labels on trial are underpowered") as failed:
        demo.show(folder, json=False)
    assert failed.value.exit_code == 1
    assert capsys.readouterr().out.splitlines()[-1] == str(folder), "what there is was shown before"


def test_a_demo_with_half_of_them_underpowered_does_not(finished, capsys):
    folder = finished(["underpowered"] * 8 + ["routing-only"] * 8)
    demo.show(folder, json=False)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)


def test_a_demo_of_another_version_is_put_aside_with_all_that_is_in_it(tmp_path, monkeypatch, capsys):
    old = tmp_path / "demo"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"demo": {"version": "0.0.1"}}))
    (old / "notes.txt").write_text("mine")
    (tmp_path / "demo-1").mkdir()
    started = []
    monkeypatch.setattr("moe_lens.cli.probe.check_models", lambda settings: started.append(old.exists()) or exit_())
    with pytest.raises(InterruptedError):
        demo.demo(output=old)
    assert started == [False]
    assert (tmp_path / "demo-2" / "notes.txt").read_text() == "mine"
    assert "is" in capsys.readouterr().err


def exit_():
    raise InterruptedError
