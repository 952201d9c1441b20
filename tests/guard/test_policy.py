"""Run: python -m pytest tests/guard/test_policy.py. What a verdict brings about, and growing replies."""

import pytest

from herdling import config
from herdling.errors import ConfigError
from herdling.guard.policy import Policy
from herdling.guard.taxonomy import CATEGORIES, Verdict
from herdling.guard.watch import REACH, Watch


def test_the_strictest_action_counts():
    policy = Policy({"default": "log", "S1": "replace", "s2": "block", "S3": "ignore"})
    assert policy.action(Verdict()) == "ignore"
    assert policy.action(Verdict(("S3",))) == "ignore"
    assert policy.action(Verdict(("S3", "S9"))) == "log"
    assert policy.action(Verdict(("S1", "S9"))) == "replace"
    assert policy.action(Verdict(("S1", "S2"))) == "block"
    assert Policy().action(Verdict(("P1",))) == "block"
    assert len(policy.table().splitlines()) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"actions": {"S15": "log"}}, "category 'S15' is unknown"),
        ({"actions": {"S1": "scold"}}, "action of S1 is 'scold'"),
        ({"actions": {"S1": "block", "s1": "ignore"}}, "actions names a category twice"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_bad_policies(given, words):
    with pytest.raises(ConfigError, match=words):
        Policy(**given)


def test_a_policy_as_a_file(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("actions: {default: log, P1: block}\nwindow: 80\noutput: false\n")
    policy = config.load(Policy, file)
    assert policy == Policy({"default": "log", "P1": "block"}, window=80, output=False)
    file.write_text("actions: {S1: scold}\n")
    with pytest.raises(ConfigError):
        config.load(Policy, file)


def test_a_reply_is_held_back_until_it_was_looked_at():
    watch = Watch(Policy(window=10), [{"role": "user", "content": "hi"}])
    shown = []
    for piece in ("one ", "two ", "three "):
        watch.push(piece)
        if watch.due:
            assert watch.messages()[-1] == {"role": "assistant", "content": "one two three "}
            shown.append(watch.passed())
    assert shown == ["one two three "]
    assert not watch.waiting
    watch.push("end")
    assert watch.waiting
    assert not watch.due
    assert watch.messages()[0] == {"role": "user", "content": "hi"}
    assert watch.passed() == "end"


def test_what_is_judged_stays_bounded():
    watch = Watch(Policy(window=10), [])
    for _ in range(1000):
        watch.push("word and ")
        watch.passed()
    watch.push("last")
    assert len(watch.messages()[-1]["content"]) == REACH + 4
