"""Records of every form become chats; what is too long is cut by rule or counted, never lost silently."""

import numpy as np
import pytest

from lm.data.chat_rows import ChatOptions, chat_of, messages_of
from lm.data.chat_template import BadChat, load_template
from lm.data.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer({"kind": "bytes", "eos_id": 256})
PLAIN = load_template("plain", TOKENIZER)
SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chat(record, **options):
    made = ChatOptions(template="plain", **options)
    made.check()
    return chat_of(record, made, PLAIN, TOKENIZER)


@pytest.mark.parametrize(("record", "options"), [
    ({"messages": SAID}, {}),
    ({"talk": SAID}, {"messages_field": "talk"}),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}),
    ({"prompt": "a", "completion": "b"}, {}),
    ({"prompt": SAID[:1], "completion": SAID[1:]}, {}),
    ({"question": "a", "answer": "b", "other": 3}, {}),
    ({"q": "a", "solution": "b", "answer": "not this"}, {"prompt_field": "q", "answer_field": "solution"}),
    ({"instruction": "a", "input": "", "output": "b"}, {}),
])
def test_every_form_of_a_record_gives_the_same_messages(record, options):
    assert messages_of(record, ChatOptions(**options)) == SAID


def test_the_input_of_an_instruction_follows_it():
    made = messages_of({"instruction": "add", "input": "1 2", "output": "3"}, ChatOptions())
    assert made[0]["content"] == "add\n\n1 2"


@pytest.mark.parametrize(("record", "reason"), [
    ({"text": "x"}, "fields missing"),
    ({"messages": "x"}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": ["x"]}, "no messages"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role"),
    ({"messages": SAID[:1]}, "no answer"),
    ({"prompt": "a", "completion": " \n"}, "empty answer"),
    ({"prompt": "a", "completion": 3}, "no messages"),
])
def test_what_is_no_chat_has_a_reason(record, reason):
    with pytest.raises(BadChat) as caught:
        chat(record)
    assert caught.value.reason == reason


def test_a_system_message_is_added_only_where_there_is_none():
    assert TOKENIZER.decode(chat({"messages": SAID}, system="S").ids).startswith("System:\nS\n\nUser:\na")
    own = [{"role": "system", "content": "own"}, *SAID]
    assert "S\n" not in TOKENIZER.decode(chat({"messages": own}, system="S").ids).replace("System", "")


LONG = [{"role": "system", "content": "sys"}, {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"}, {"role": "user", "content": "second"},
        {"role": "assistant", "content": "last answer"}]


def answer(made):
    return TOKENIZER.decode(made.ids[made.response])


def test_a_chat_that_is_too_long_is_cut_by_the_rule():
    whole = chat({"messages": LONG})
    size = len(whole.ids)
    assert not whole.cut and answer(whole) == "first answerlast answer"
    assert not chat({"messages": LONG}, max_tokens=size).cut

    start = chat({"messages": LONG}, max_tokens=40, too_long="start")
    assert start.cut and len(start.ids) == 40
    np.testing.assert_array_equal(start.ids, whole.ids[-40:])
    assert answer(start) == "last answer" and start.ids[start.response][-1] == 256  # the end is there

    end = chat({"messages": LONG}, max_tokens=size - 8, too_long="end")
    assert end.cut and answer(end) == "first answerlast a"[:len(answer(end))] and end.ids[-1] != 256

    turns = chat({"messages": LONG}, max_tokens=70, too_long="turns")
    assert turns.cut and TOKENIZER.decode(turns.ids) == "System:\nsys\n\nUser:\nsecond\n\nAssistant:\nlast answer\n\n"
    assert answer(turns) == "last answer"


@pytest.mark.parametrize(("rule", "most"), [("skip", 40), ("start", 14), ("end", 20), ("turns", 20)])
def test_a_rule_that_would_leave_nothing_to_learn_refuses_the_row(rule, most):
    with pytest.raises(BadChat, match=f"max_tokens is {most}") as caught:
        chat({"messages": LONG}, max_tokens=most, too_long=rule)
    assert caught.value.reason == "too long"


def test_groups_are_by_length_of_the_answers_or_by_a_field():
    by = lambda record, rule: chat(record, group_by=rule).group
    assert by({"prompt": "a", "completion": "x" * 9}, "length:10") == "long"  # nine bytes and the eos
    assert by({"prompt": "a" * 50, "completion": "x" * 8}, "length:10") == "short"
    assert by({"prompt": "a", "completion": "b", "teacher": "70b"}, "field:teacher") == "70b"
    with pytest.raises(BadChat, match="no field 'teacher'"):
        by({"prompt": "a", "completion": "b"}, "field:teacher")


@pytest.mark.parametrize(("options", "message"), [
    ({"too_long": "cut"}, "no choice 'cut'"),
    ({"prompt_field": "q"}, "belong together"),
    ({"group_by": "size:3"}, "group_by must be"),
    ({"max_tokens": 1}, "at least 2"),
])
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        chat({"messages": SAID}, **options)
