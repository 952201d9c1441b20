"""lm-eval through the server and in process: the same numbers, on a task made here.

The task files hold small sums, so nothing is fetched (the hub is switched off); as a YAML, because this
is how people bring their own.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import lm_eval
import lm_eval.models  # registers local-completions and others
from lm_eval.tasks import TaskManager

from herdling.eval.lm_eval import Herdling

CHOICE = """
task: sums_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITTEN = """
task: sums_written
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} ="
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n", " 7"]
  max_gen_toks: 12
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: sums_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
"""
TASKS = {"sums_choice": CHOICE, "sums_written": WRITTEN, "sums_rolling": ROLLING}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    place = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    with open(place / "sums.jsonl", "w") as file:
        for i in range(12):
            a, b = 3 + i % 5, 2 + i % 7
            row = {
                "question": f"What is {a} + {b}?",
                "choices": [f" {a + b + shift}" for shift in (-1, 0, 2)],
                "answer": 1,
                "text": f"the quick brown fox jumps {a} times over {b} lazy dogs. " * (1 + i),
            }
            file.write(json.dumps(row) + "\n")
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.format(data=place / "sums.jsonl"))
    return TaskManager(include_path=str(place), include_defaults=False)


@pytest.fixture(scope="module")
def model(folder) -> Callable[..., Herdling]:
    return lambda **more: Herdling(folder, **more)


def evaluate(model: Any, tasks: TaskManager, *names: str, **more: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0, **more
    )
    assert found is not None
    return found


def completions(server, folder: str, **more: Any) -> Any:
    kind = lm_eval.api.registry.get_model("local-completions")
    return kind(model="toy", base_url=f"{server.url}/v1/completions", **more)


def scores(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, request by request."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def numbers(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{name}": value
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_log_likelihoods_and_texts_are_those_of_the_process(
    server, folder, tasks, model, backend, trained
):
    """The server's tokenizer leaves begin_of_text out; the folder's own puts it in where asked to.

    Then lm-eval's rolling windows have it twice, once to be scored, so these are left to the former.
    """
    names = [name for name in TASKS if backend == "remote" or name != "sums_rolling"]
    ours = evaluate(model(add_bos_token=backend == "huggingface", max_length=2047), tasks, *names)
    own: dict[str, Any] = {"tokenizer_backend": backend, "num_concurrent": 4}
    if backend == "huggingface":
        own |= {"tokenizer": folder, "add_bos_token": True}
    theirs = evaluate(completions(server, folder, **own), tasks, *names)
    for sample, other in zip(
        scores(ours, "sums_choice"), scores(theirs, "sums_choice"), strict=True
    ):
        assert len(sample) == 3
        for (mine, greedy), (its, its_greedy) in zip(sample, other, strict=True):
            assert mine == pytest.approx(its, abs=1e-3)
            assert mine < 0
            assert greedy == its_greedy
    assert scores(ours, "sums_written") == scores(theirs, "sums_written")
    assert trained or any(text for [text] in scores(ours, "sums_written"))
    assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-3, rel=1e-5)
    assert len(numbers(ours)) >= len(names)


def test_batches_of_token_ids(server, folder, tasks):
    """Several prompts a call, one after the other: the same as one each."""
    alone = evaluate(completions(server, folder), tasks, "sums_choice")
    batched = evaluate(completions(server, folder, batch_size=8), tasks, "sums_choice")
    assert numbers(alone) == pytest.approx(numbers(batched), abs=1e-6)


def test_chat_completions(server, tasks):
    kind = lm_eval.api.registry.get_model("local-chat-completions")
    chat = kind(model="toy", base_url=f"{server.url}/v1/chat/completions")
    found = evaluate(chat, tasks, "sums_written", apply_chat_template=True)
    assert len(scores(found, "sums_written")) == 12


def test_chat_in_process(tasks, model):
    """The template comes as text and is read back to the ids of the model's own rendering."""
    ours = model()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert ours.tok_encode(ours.apply_chat_template(turns)) == list(ours.lm.render(turns).ids)
    begun = [*turns, {"role": "assistant", "content": "Well"}]
    text = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert text == ours.apply_chat_template(turns) + "Well"
    found = evaluate(ours, tasks, "sums_written", apply_chat_template=True)
    assert len(scores(found, "sums_written")) == 12


def test_the_numbers_are_the_models(model):
    """Against the plain forward, which shares nothing with the engine's own account."""
    ours = model(max_length=64)
    text = "the quick brown fox " * 12
    ids = ours.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 63

    def request(*args: Any) -> Any:
        return type("Request", (), {"args": args})

    context, continuation = ids[:10], ids[10:20]
    chances = ours.lm.logits([context + continuation])[0].log_softmax(-1)
    wanted = sum(float(chances[9 + i, id]) for i, id in enumerate(continuation))
    [(value, greedy)] = ours._loglikelihood_tokens([(None, context, continuation)])
    assert value == pytest.approx(wanted, abs=1e-4)
    assert greedy == all(int(chances[9 + i].argmax()) == id for i, id in enumerate(continuation))

    total, window = 0.0, 63
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if start == 0:
            before = [ours.prefix_token_id]
        else:  # the last window reaches back as far as it may, only its new tokens count
            before = ids[start + len(piece) - window - 1 : start]
        chances = ours.lm.logits([before + piece])[0].log_softmax(-1)
        rows = range(len(before) - 1, len(before) + len(piece) - 1)
        total += sum(float(chances[row, id]) for row, id in zip(rows, piece, strict=True))
    assert ours.loglikelihood_rolling([request(text)])[0] == pytest.approx(total, abs=1e-3)


def test_settings_that_mean_nothing_are_refused(model):
    from herdling.errors import ConfigError
    from herdling.eval.lm_eval import read_settings

    with pytest.raises(ConfigError, match="num_beams"):
        read_settings({"num_beams": 4}, 256)
    assert read_settings({"do_sample": False, "temperature": 1.0}, 9)["temperature"] == 0
    assert read_settings({"until": "x", "max_new_tokens": 3}, 9)["max_tokens"] == 3
    with pytest.raises(ConfigError, match="max_length"):
        model(max_length=10**9)


def test_the_command_line(folder, tasks, tmp_path):
    import subprocess

    (place,) = {
        str(Path(task.yaml_path).parent) for task in tasks.task_index.values() if task.yaml_path
    }
    command = [sys.executable, "-m", "herdling.eval.lm_eval", "run", "--model", "herdling"]
    command += ["--model_args", f"path={folder}", "--tasks", "sums_choice", "--include_path", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sums_choice" in done.stdout
