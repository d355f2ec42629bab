"""Parts of a benchmark that ran side by side make one result, or none if they are not alike."""

import json

import pytest

from afbs_compile.bench import compensation, merge

ROW = dict.fromkeys(compensation.KEY, "same")


def part(folder, setting, **changes):
    folder.mkdir()
    document = {
        "name": "compensation", "schema": 1, "commit": "c", "device": "d", "versions": {},
        "command": f"run {setting}", "date": setting, "notes": ["short"],
        "rows": [ROW | {"setting": setting, "kl": 1}, ROW | {"setting": "both", "kl": setting}],
    }  # fmt: skip
    (folder / "compensation.json").write_text(json.dumps(document | changes))
    return str(folder)


def test_rows_of_all_parts_once(tmp_path):
    parts = [part(tmp_path / name, name) for name in ("a", "b")]
    assert merge.main(["compensation", *parts, "--output", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "compensation.json").read_text())
    found = {row["setting"]: row["kl"] for row in made["rows"]}
    assert (found, len(made["rows"])) == ({"a": 1, "both": "a", "b": 1}, 3)
    assert made["command"] == "run a; run b"
    assert made["notes"] == ["short"]


@pytest.mark.parametrize("differs", ["commit", "device", "versions"])
def test_parts_of_other_machines_are_refused(tmp_path, capsys, differs):
    parts = [part(tmp_path / "a", "a"), part(tmp_path / "b", "b", **{differs: "other"})]
    assert merge.main(["compensation", *parts, "--output", str(tmp_path)]) == 1
    assert differs in capsys.readouterr().err
    assert not (tmp_path / "compensation.json").exists()


def test_a_part_that_is_not_there(tmp_path, capsys):
    parts = [part(tmp_path / "a", "a"), str(tmp_path / "b")]
    assert merge.main(["compensation", *parts, "--output", str(tmp_path)]) == 1
    assert "cannot be merged" in capsys.readouterr().err
