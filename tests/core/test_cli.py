"""The command line: exit codes, JSON on stdout, messages on stderr."""

import json

import pytest
import torch

import afbs_compile
from afbs_compile import cache, cli
from afbs_compile.commands import doctor
from afbs_compile.policy import Policy

KEY = "ab" * 16


@pytest.fixture
def afbs(capsys):
    """Run `afbs …`: exit code, stdout, stderr."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("afbs 0.")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["dance"])


def test_show_without_anything_says_what_to_do(afbs, private_cache):
    code, out, error = afbs("show")
    assert (code, out) == (1, "")
    assert str(private_cache) in error
    assert "afbs demo" in error


def test_show_takes_the_newest_a_key_or_a_file(afbs, policy, tuning, tmp_path):
    cache.store(policy(tuning(created="2026-01-01"), key="old1"))
    cache.store(policy(tuning(created="2026-02-01"), key="new1"))
    shared = tmp_path / "shared.json"
    shared.write_text(policy(key="filed").to_json())
    for arguments, model in (((), "new1"), (("old",), "old1"), ((shared,), "filed")):
        code, out, error = afbs("show", *arguments, "--json")
        assert (code, error) == (0, "")
        assert json.loads(out)["model"] == model


def test_show_refuses_a_doubtful_key(afbs, policy):
    for key in ("aa1", "aa2"):
        cache.store(policy(key=key))
    code, _, error = afbs("show", "aa")
    assert code == 1
    assert "aa1, aa2; give more" in error
    code, _, error = afbs("show", "zz")
    assert code == 1
    assert "'zz'" in error


def test_show_refuses_a_damaged_file(afbs, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text("{")
    code, out, error = afbs("show", path)
    assert (code, out) == (1, "")
    assert str(path) in error
    assert "delete it" in error


def test_show_table_and_heatmap(afbs, policy, tmp_path):
    cache.store(policy())
    picture = tmp_path / "map.png"
    code, out, _ = afbs("show", "--heatmap", picture)
    assert code == 0
    assert picture.stat().st_size > 1000
    for word in ("layers.0.attn", "0.30", "0.050 – 0.100", "400.00", "dense: it is not faster"):
        assert word in out


def test_show_heatmap_that_cannot_be_written(afbs, policy, tmp_path):
    cache.store(policy())
    for path in (tmp_path / "no" / "map.png", tmp_path / "map.nonsense"):
        code, _, error = afbs("show", "--heatmap", path)
        assert code == 1
        assert f"{path} cannot be written" in error


def test_heatmap_without_a_tuning(afbs, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(Policy("empty", None).to_json())
    code, _, error = afbs("show", path, "--heatmap", tmp_path / "map.png")
    assert code == 1
    assert "empty holds no tuning" in error


def test_cache_commands(afbs, policy, private_cache):
    folder = private_cache / "policies"
    assert afbs("cache", "path") == (0, f"{folder}\n", "")
    assert json.loads(afbs("cache", "path", "--json")[1]) == {"path": str(folder)}
    cache.store(policy())
    code, out, _ = afbs("cache", "ls")
    assert code == 0
    assert KEY in out
    (entry,) = json.loads(afbs("cache", "ls", "--json")[1])["entries"]
    assert (entry["key"], entry["problem"], entry["model_name"]) == (KEY, None, "Tiny")
    assert entry["tunings"] == [{"length": 4096, "density": pytest.approx(0.65)}]
    assert afbs("cache", "verify")[:2] == (0, "1 checked, 0 cannot be used\n")


def test_cache_verify_finds_damage(afbs, policy):
    path = cache.store(policy())
    path.write_text(path.read_text()[:-20])
    code, out, _ = afbs("cache", "verify")
    assert code == 1
    assert out.startswith(f"{KEY}: {path} cannot be used")
    code, out, _ = afbs("cache", "verify", "--json")
    assert code == 1
    assert list(json.loads(out)["problems"]) == [KEY]
    assert "cannot be used" in afbs("cache", "ls")[1]


def test_cache_rm(afbs, policy):
    path = cache.store(policy())
    cache.store(policy(key="other"))
    assert json.loads(afbs("cache", "rm", KEY, "--json")[1]) == {"removed": [str(path)]}
    code, _, error = afbs("cache", "rm", KEY)
    assert code == 1
    assert f"nothing is kept of '{KEY}'" in error
    code, _, error = afbs("cache", "rm", "../x")
    assert code == 1
    assert "model key" in error
    code, out, _ = afbs("cache", "rm", "--all")
    assert code == 0
    assert out.startswith("removed ")
    assert cache.entries() == []
    for wrong in (["cache", "rm"], ["cache", "rm", "x", "--all"]):
        with pytest.raises(SystemExit, match="2"):
            afbs(*wrong)


def test_cache_dir_option(afbs, policy, tmp_path):
    cache.store(policy(), tmp_path / "mine")
    assert KEY in afbs("cache", "ls", "--cache-dir", tmp_path / "mine")[1]
    assert KEY not in afbs("cache", "ls")[1]
    assert afbs("show", KEY, "--cache-dir", tmp_path / "mine")[0] == 0


def test_doctor_on_a_healthy_machine(afbs):
    code, out, _ = afbs("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["healthy"] is True
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["backend registered"]["found"] == "afbs_compile.backend:afbs"
    assert found["kernels"]["found"] in ("Triton", "compiled FlexAttention")
    assert all(f["well"] or f["next_step"] for f in report["findings"])
    assert "C++ compiler" in afbs("doctor")[1]


def test_doctor_lists_the_attention_of_a_model(afbs, tiny_model, fresh_dynamo):
    arguments = ("doctor", "--model", tiny_model, "--tokens", 300)
    code, out, _ = afbs(*arguments, "--min-length", 100, "--json")
    assert code == 0
    sites = json.loads(out)["attention"]["sites"]
    assert [s["name"] for s in sites] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert {(s["decision"], s["mask"], s["kernel"], s["length"]) for s in sites} == {
        ("can be sparse", "causal", "FlexAttention", 300)
    }
    torch._dynamo.reset()
    code, out, _ = afbs(*arguments)
    assert "short: 300 queries" in out
    assert "set min_length lower" in out


def test_doctor_fails_where_the_cache_cannot_be_written(afbs, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    code, out, _ = afbs("doctor", "--json", "--cache-dir", blocked)
    (bad,) = [f for f in json.loads(out)["findings"] if not f["well"]]
    assert code == 1
    assert bad["name"] == "cache folder"
    assert "AFBS_CACHE_DIR" in bad["next_step"]
    assert "MISSING" in afbs("doctor", "--cache-dir", blocked)[1]


def test_doctor_names_missing_packages(afbs, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "scipy" else "1")
    code, out, _ = afbs("doctor", "--json")
    (bad,) = [f for f in json.loads(out)["findings"] if not f["well"]]
    assert code == 1
    assert bad["next_step"] == "run `pip install scipy`"


def test_doctor_without_the_demo_packages_is_healthy(afbs, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "gguf" else "1")
    code, out, _ = afbs("doctor", "--json")
    (bad,) = [f for f in json.loads(out)["findings"] if not f["well"]]
    assert code == 0
    assert "afbs-compile[demo]" in bad["next_step"]


def test_doctor_without_a_compiler(afbs, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    code, out, _ = afbs("doctor", "--json")
    (bad,) = [f for f in json.loads(out)["findings"] if not f["well"]]
    assert code == 1
    assert "g++" in bad["next_step"]


def test_doctor_sees_the_switch(afbs, monkeypatch):
    monkeypatch.setenv("AFBS_DISABLE", "1")
    code, out, _ = afbs("doctor")
    assert code == 0
    assert "AFBS_DISABLE is set" in out


def test_bad_log_level(afbs, monkeypatch):
    monkeypatch.setenv("AFBS_LOG", "loud")
    code, _, error = afbs("cache", "path")
    assert code == 1
    assert "AFBS_LOG" in error


def test_interrupt(afbs, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert afbs("doctor") == (130, "", "afbs doctor: interrupted\n")


@pytest.fixture
def fake_tune(monkeypatch, policy):
    """`afbs_compile.tune` that notes what it is given and finds the document's policy."""
    given = {}

    def tune(module, inputs, **options):
        given.update(module=module, inputs=inputs, options=options)
        return policy()

    monkeypatch.setattr(afbs_compile, "tune", tune, raising=False)
    return given


def test_tune(afbs, fake_tune, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 100)
    out = tmp_path / "new" / "policy.json"
    code, printed, _ = afbs(
        "tune", "--model", tiny_model, "--text", text, "--tokens", 64, "--max-error", 0.1,
        "--cache-dir", tmp_path, "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(printed)["policy_path"] == str(out)
    assert Policy.read(out).model == json.loads(printed)["model"] == KEY
    assert fake_tune["options"] == {"max_error": 0.1, "cache_dir": tmp_path}
    assert [i["input_ids"].shape for i in fake_tune["inputs"]] == [(1, 64)]
    code, printed, _ = afbs("tune", "--model", tiny_model, "--text", text, "--tokens", 50)
    assert code == 0
    assert "layers.0.attn" in printed
    assert [i["input_ids"].shape for i in fake_tune["inputs"]] == [(1, 50), (1, 50)]


def test_tune_shares_the_work(afbs, fake_tune, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 100)
    arguments = ("tune", "--model", tiny_model, "--text", text, "--tokens", 64)
    code, _, _ = afbs(*arguments, "--executor", "local", "--workers", 3, "--tuning-budget-s", 2)
    assert code == 0
    loader = fake_tune["options"].pop("loader")
    assert fake_tune["options"] == {"executor": "local", "workers": 3, "tuning_budget_s": 2.0}
    pairs = zip(loader().parameters(), fake_tune["module"].parameters(), strict=True)
    assert all(mine.equal(theirs) for mine, theirs in pairs)
    code, _, error = afbs(*arguments, "--workers", 3)
    assert (code, "--executor" in error) == (1, True)


def test_tune_of_calls_that_are_too_short(afbs, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 64)
    code, out, error = afbs("tune", "--model", tiny_model, "--text", text, "--tokens", 64)
    assert (code, out) == (1, "")
    assert "cannot be tuned: no attention call can be made sparse" in error


@pytest.mark.usefixtures("fake_tune")
def test_tune_that_cannot_write(afbs, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 100)
    arguments = ("tune", "--model", tiny_model, "--text", text, "--tokens", 64)
    code, out, error = afbs(*arguments, "--out", text / "policy.json")
    assert (code, out) == (1, "")
    assert "cannot be written" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tune", "--max-error", "7"), "'max_error' is 7.0; give a number from 0 to 1"),
        (("tune", "--min-length", "0"), "'min_length' is 0"),
        (("tune",), "no-model holds no config.json"),
    ],
)
def test_tune_refuses(afbs, tmp_path, arguments, says):
    rest = ("--model", tmp_path / "no-model", "--text", tmp_path / "x", "--tokens", "64")
    code, out, error = afbs(*arguments, *rest)
    assert (code, out) == (1, "")
    assert says in error
