"""The commands as users meet them: what they print, and one line and exit code 2 for whatever is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import latentrt
from latentrt.cli import main
from tests.conftest import VOCAB_SIZE


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments) -> str:
    """The error line of a command that must fail."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_generate_prints_the_answer_and_a_summary(capsys, tiny_bundle):
    expected = latentrt.load(tiny_bundle).generate(["ab"])[0]
    code, out, err = run(capsys, "generate", tiny_bundle, "--prompt", "ab")
    assert (code, out) == (0, expected.text + "\n")
    assert "3 prompt tokens" in err and f"{len(expected.token_ids)} new" in err and "end: length" in err


def test_generate_json_has_every_prompt(capsys, tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("from a file\n")
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt.txt"))  # noqa: SIM115
    code, out, _ = run(
        capsys, "generate", tiny_bundle, "--prompt", "a", "--prompt", "b", "--prompt-file", tmp_path / "prompt.txt",
        "--prompt-file", "-", "--max-new-tokens", 5, "--temperature", 0.8, "--seed", 3, "--top-k", 50, "--top-p", 0.9,
        "--min-p", 0.01, "--repetition-penalty", 1.1, "--stop", "xyzzy", "--ignore-eos", "--threads", 1, "--json",
    )  # fmt: skip
    answer = json.loads(out)
    assert code == 0 and answer["target"] == "cpu"
    assert [r["prompt"] for r in answer["results"]] == ["a", "b", "from a file", "from a file"]
    assert answer["results"][2]["token_ids"] == answer["results"][3]["token_ids"]  # the same seed
    assert {r["finish_reason"] for r in answer["results"]} == {"length"}
    assert set(answer["results"][0]["timings"]) > {"prefill_seconds", "decode_tokens_per_second"}


def test_several_prompts_are_shown_each_with_its_answer(capsys, tiny_bundle):
    _, out, err = run(capsys, "generate", tiny_bundle, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 2)
    assert out.count("> ") >= 2 and err.count("end: length") == 2


def test_generate_chat_uses_the_template(capsys, tiny_bundle):
    engine = latentrt.load(tiny_bundle)
    tokens = engine.chat_tokens([{"role": "user", "content": "hi"}])
    _, out, _ = run(capsys, "generate", tiny_bundle, "--prompt", "hi", "--chat", "--max-new-tokens", 4, "--json")
    result = json.loads(out)["results"][0]
    assert result["prompt_tokens"] == len(tokens) and result["prompt"] == "hi"


def test_options_that_have_no_effect_are_said(capsys, tiny_bundle):
    command = "generate", tiny_bundle, "--prompt", "a", "--max-new-tokens", 1, "--top-p", 0.9, "--seed", 1
    assert "top-p, seed has no effect at temperature 0" in run(capsys, *command)[2]
    assert "no effect" not in run(capsys, *command, "--temperature", 1)[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no prompt; give --prompt TEXT"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, accepted"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0, accepted"),
        (["--prompt", "a", "--top-k", "-3"], "top_k is -3, accepted"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0, accepted"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1, accepted"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["--prompt", "a", "--stop", ""], "stop has ''"),
        (["--prompt", "a", "--target", "sm90"], "has no target 'sm90', only cpu"),
        (["--prompt", "a", "--backend", "abacus"], "no backend 'abacus', accepted: onnxruntime"),
        (["--prompt", "a", "--backend", "tensorrt"], "is for backend onnxruntime, accepted: onnxruntime, torch"),
        (["--prompt", "a", "--threads", "-1"], "threads is -1"),
        (["--prompt", "a", "--cache-tokens", "0"], "cache_tokens is 0"),
        (["--prompt", "a", "--device", "toaster"], "device is 'toaster', accepted: auto, cpu, cuda"),
        (["--prompt", "a", "--device", "cuda"], "device is 'cuda', but target cpu runs on the CPU (onnxruntime)"),
        (["--prompt", "a", "--no-such-option"], "--no-such-option"),
        (["--prompt-file", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["--prompt-file", "/"], "/: cannot be read"),
        (["--prompt", "a" * 3000], "prompt 0 has"),
        (["--prompt", "a\udcff"], "prompt 0: text is not valid Unicode"),
    ],
)
def test_wrong_options_of_generate(capsys, tiny_bundle, options, message):
    assert message in fails(capsys, "generate", tiny_bundle, *options)


def test_the_device_is_the_backends(capsys, tiny_bundle):
    options = "--prompt", "a", "--max-new-tokens", 3, "--ignore-eos"
    assert run(capsys, "generate", tiny_bundle, *options, "--device", "cpu")[0] == 0
    assert run(capsys, "generate", tiny_bundle, *options, "--backend", "torch", "--device", "cpu")[0] == 0
    import torch

    if not torch.cuda.is_available():
        error = fails(capsys, "generate", tiny_bundle, *options, "--backend", "torch", "--device", "cuda")
        assert "sees no CUDA GPU; use device 'cpu'" in error


def test_errors_are_json_too(capsys, tiny_bundle, tmp_path):
    for arguments in (["generate", tiny_bundle], ["info", tmp_path / "none"], ["generate", tiny_bundle, "--seed", "x"]):
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 2 and json.loads(out)["error"] in err and set(json.loads(out)) == {"error", "kind"}


@pytest.mark.parametrize(
    ("arguments", "message"), [(["fly"], "'fly'; see latentrt --help"), (["info"], "BUNDLE"), (["--fly"], "--fly")]
)
def test_wrong_commands(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_without_a_command_there_is_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (2, "") and all(command in out for command in ("build", "generate", "validate", "--version"))


def test_the_versions_that_matter(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and f"latentrt {latentrt.__version__}" in out and f"onnxruntime {version('onnxruntime')}" in out


def with_text(bundle: Path, **changes) -> Path:
    """Changes what a bundle says about text."""
    content = json.loads((bundle / "manifest.json").read_text())
    content["text"] |= changes
    (bundle / "manifest.json").write_text(json.dumps(content))
    return bundle


def test_the_bundles_sampling_defaults_are_used_where_nothing_is_given(capsys, copy, tiny_bundle):
    defaults = {"temperature": 0.8, "top_k": 40, "max_new_tokens": 7}
    with_text(copy, sampling=defaults)
    command = "generate", copy, "--prompt", "a", "--ignore-eos", "--json"
    params = latentrt.SamplingParams(**defaults, ignore_eos=True)
    answer = json.loads(run(capsys, *command)[1])
    assert answer["params"] == json.loads(json.dumps(asdict(params))) and len(answer["results"][0]["token_ids"]) == 7
    engine = latentrt.load(copy)
    assert engine.default_params == latentrt.SamplingParams(**defaults) and len(engine.generate(["a"])[0].token_ids) <= 7
    drawn = engine.generate(["a"], replace(params, seed=3, max_new_tokens=9))[0].token_ids
    answer = json.loads(run(capsys, *command, "--seed", 3, "--max-new-tokens", 9)[1])
    assert tuple(answer["results"][0]["token_ids"]) == drawn
    greedy = latentrt.load(tiny_bundle).generate(["a"], latentrt.SamplingParams(max_new_tokens=7, ignore_eos=True))[0]
    _, out, err = run(capsys, *command, "--temperature", 0)
    assert tuple(json.loads(out)["results"][0]["token_ids"]) == greedy.token_ids and err == ""


def test_info_tells_what_is_known_about_text(capsys, tiny_bundle, copy):
    _, out, _ = run(capsys, "info", tiny_bundle)
    shown = "tokenizer.json, PreTrainedTokenizerFast, 320 tokens", "default", "1 '<eos>'", "temperature 0 (greedy)"
    assert [word for word in shown if word not in out] == [] and "not applied" not in out
    end = {"id": 7, "token": "[/x]", "sources": ["config.json"]}
    with_text(copy, sampling={"temperature": 0.5, "top_p": 0.9}, ignored=["num_beams 4"], end_of_text=[end])
    _, out, _ = run(capsys, "info", copy)
    shown = "temperature 0.5, top_p 0.9", "num_beams 4", "7 '[/x]' (config.json)"
    assert [word for word in shown if word not in out] == []
    with_text(copy, tokenizer=None, templates={}, end_of_text=[])
    _, out, _ = run(capsys, "info", copy)
    shown = "none: token ids only", "none: plain prompts only", "none: answers end at their longest length"
    assert [word for word in shown if word not in out] == []


@pytest.mark.parametrize(
    "raw",
    [b"a \r\n\nb\n", b"a \r\n\nb\r\n", b"a \r\n\nb", b"\xef\xbb\xbfa \r\n\nb\n", "a \r\n\nb\r\n".encode("utf-16"),
     b"\xfe\xff" + "a \r\n\nb\n".encode("utf-16-be")],
)  # fmt: skip
def test_a_prompt_files_mark_and_last_line_end_are_no_text(capsys, tiny_bundle, tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    _, out, _ = run(capsys, "generate", tiny_bundle, "--prompt-file", tmp_path / "x", "--max-new-tokens", 1, "--json")
    assert json.loads(out)["results"][0]["prompt"] == "a \r\n\nb"


def test_generate_chat_with_a_system_message(capsys, tiny_bundle):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    command = "generate", tiny_bundle, "--prompt", "hi", "--system", "be brief", "--max-new-tokens", 1, "--json"
    result = json.loads(run(capsys, *command, "--chat")[1])["results"][0]
    assert result["prompt_tokens"] == len(latentrt.load(tiny_bundle).chat_tokens(messages))
    assert "--system is a message of a chat; give --chat too" in run(capsys, *command)[2]


def test_a_prompt_file_that_is_not_text(capsys, tiny_bundle, tmp_path):
    (tmp_path / "x").write_bytes(b"a\xff")
    assert "is not UTF-8 text" in fails(capsys, "generate", tiny_bundle, "--prompt-file", tmp_path / "x")


def test_info_shows_the_passport(capsys, tiny_bundle):
    code, out, _ = run(capsys, "info", tiny_bundle, "--verify")
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert code == 0 and "every file fits its digest" in out
    shown = "target cpu", "onnxruntime", "fp32", "per token", "executed", "evidence", manifest["checkpoint"]["digest"][:40]
    assert [word for word in shown if word not in out] == []
    code, out, _ = run(capsys, "info", tiny_bundle, "--verify", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["verified"] and answer["manifest"] == manifest


def graph_file(bundle: Path) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return bundle / "files" / manifest["targets"]["cpu"]["engines"]["absorbed"]["graph"]["file"]


def test_info_verify_names_a_changed_file(capsys, copy):
    file = graph_file(copy)
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert run(capsys, "info", copy)[0] == 0  # sizes only
    assert f"{file}: content does not fit its digest" in fails(capsys, "info", copy, "--verify")
    code, out, _ = run(capsys, "info", copy, "--verify", "--json")
    assert code == 2 and str(file) in json.loads(out)["findings"][0]


@pytest.mark.parametrize("command", [["info"], ["generate", "--prompt", "a"], ["chat"]])
@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_damaged_bundles_are_refused_by_name(capsys, copy, command, damage):
    file = graph_file(copy)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file = copy / "manifest.json"
        file.write_text(file.read_text()[:-5])
    assert str(file) in fails(capsys, command[0], copy, *command[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this version reads 4; build the bundle again"),
        ({"surprise": 1}, "surprise"),
        ({"targets": {}}, "has target"),
        ({"config": ...}, "config: Field required"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(capsys, copy, changes, message):
    file = copy / "manifest.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    assert message in fails(capsys, "generate", copy, "--prompt", "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "abacus"}, "targets.cpu.backend: Input should be 'onnxruntime'"),
        ({"backend_version": "99.1.0"}, "built with onnxruntime 99.1.0"),
        ({"limits": {"max_context": "many"}}, "targets.cpu.limits.max_context"),
    ],
)
def test_targets_that_cannot_run_here_are_refused(capsys, copy, changes, message):
    file = copy / "manifest.json"
    content = json.loads(file.read_text())
    content["targets"]["cpu"] |= changes
    file.write_text(json.dumps(content))
    assert message in fails(capsys, "generate", copy, "--prompt", "a")


def test_a_graph_of_the_right_size_that_is_no_graph_is_refused(capsys, copy):
    file = graph_file(copy)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert f"{file}: onnxruntime" in fails(capsys, "generate", copy, "--prompt", "a")


def test_logits_are_those_of_the_engine(capsys, tiny_bundle, tmp_path):
    lists = [[1, 2, 3], [4], list(range(200))]
    (tmp_path / "ids.json").write_text(json.dumps(lists))
    out = tmp_path / "logits.npy"
    code, text, _ = run(capsys, "logits", tiny_bundle, "--tokens", tmp_path / "ids.json", "--out", out, "--json")
    assert code == 0 and json.loads(text)["shape"] == [204, VOCAB_SIZE]
    found = np.load(out)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, latentrt.load(tiny_bundle).logits(lists))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.json", "logits.npy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"), ("[[1]", "not valid JSON"), (b"\xff", "not valid JSON"), ("[" * 100000, "not valid JSON"),
        ("{}", "holds dict"), ("7", "holds int"), ("[]", "holds an empty list"), ("[1, 2]", "entry 0 is int 1"),
        ('[[1], "ab"]', "entry 1 is str ab"), ("[[1], []]", "token list 1 is empty; give one token id or more"),
        ("[[1.5]]", "token 0 is 1.5"),
        ("[[true]]", "token 0 is True"), ("[[NaN]]", "token 0 is nan"), ("[[-1]]", "token 0 is -1"),
        ("[[1, 320]]", "token 1 is 320"),
        ("[[99999999999999999999]]", "token 0 is 99999999999999999999"), (json.dumps([[1] * 999]), "has 999 tokens"),
    ],
)  # fmt: skip
def test_malformed_token_files(capsys, tiny_bundle, tmp_path, content, message):
    ids, out = tmp_path / "ids.json", tmp_path / "logits.npy"
    ids.write_bytes(content if isinstance(content, bytes) else content.encode())
    out.write_text("before")
    assert message in fails(capsys, "logits", tiny_bundle, "--tokens", ids, "--out", out)
    assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_logits_go_to_a_file_that_can_be_written(capsys, tiny_bundle, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text("[[1]]")
    assert "is a folder" in fails(capsys, "logits", tiny_bundle, "--tokens", ids, "--out", tmp_path)
    assert "its folder is missing" in fails(capsys, "logits", tiny_bundle, "--tokens", ids, "--out", tmp_path / "a" / "b")
    assert "cannot be read" in fails(capsys, "logits", tiny_bundle, "--tokens", tmp_path / "no", "--out", tmp_path / "b")


def chat(bundle: Path, text: str, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "latentrt", "chat", str(bundle), "--max-new-tokens", "8", *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def test_chat_by_pipe_one_line_one_turn(tiny_bundle):
    done = chat(tiny_bundle, "hello\n\nagain\n/reset\nhello\n/exit\nnever\n", "--system", "Be brief.")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")].count("> hello") == 2
    assert done.stderr.count("prompt tokens") == 3 and done.stderr.count("cached") == 2 and "forgotten" in done.stderr
    assert "never" not in done.stdout


def test_chat_says_when_the_conversation_no_longer_fits_and_goes_on(tiny_bundle):
    done = chat(tiny_bundle, "x" * 2000 + "\nhello\n")
    assert done.returncode == 2 and "the conversation has" in done.stderr and "/reset" in done.stderr
    assert done.stderr.count("prompt tokens") == 1 and "Traceback" not in done.stderr


def test_ctrl_c_stops_the_answer_not_the_chat(tiny_bundle):
    command = [sys.executable, "-m", "latentrt", "chat", str(tiny_bundle), "--max-new-tokens", "200", "--ignore-eos"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        process.stdout.readline()  # the message; the answer begins
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        _, err = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0 and b"[stopped]" in err and b"Traceback" not in err


def test_generate_into_a_closed_pipe_is_quiet(tiny_bundle):
    command = f"{sys.executable} -m latentrt generate {tiny_bundle} --prompt a --max-new-tokens 60 --ignore-eos"
    done = subprocess.run(["bash", "-c", f"{command} | head -c 1 > /dev/null"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
