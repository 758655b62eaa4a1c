"""The files that trainer and monitor share."""

import json
import os

import pytest

from pixart_nodes.training import run_dir


@pytest.mark.parametrize("times", [3, 10**9])
def test_a_file_that_a_reader_has_open_on_windows_is_waited_for_a_while(tmp_path, monkeypatch, times):
    refused, replace = [], os.replace

    def open_elsewhere(source, target):
        if len(refused) < times:
            refused.append(source)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    run_dir.write_json(tmp_path / "status.json", {"step": 1})
    monkeypatch.setattr(run_dir, "OPEN_ELSEWHERE", 0.5)
    monkeypatch.setattr(os, "replace", open_elsewhere)
    if times == 3:
        run_dir.write_json(tmp_path / "status.json", {"step": 2})
    else:
        with pytest.raises(PermissionError):
            run_dir.write_json(tmp_path / "status.json", {"step": 2})
    assert json.loads((tmp_path / "status.json").read_text()) == {"step": 2 if times == 3 else 1}
    assert len(refused) >= 3 and [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_file_is_known_again_by_its_seal_until_somebody_writes_it_anew(tmp_path):
    path = tmp_path / "fox.safetensors"
    assert run_dir.seal(path) is None
    path.write_text("a fox")
    first = run_dir.seal(path)
    assert json.loads(json.dumps(first)) == run_dir.seal(path)
    path.write_text("another")
    assert run_dir.seal(path) != first
