"""What rows become by the keys of `[data]`: labels to choose from, several tasks in one file, and
conversations in a model's chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedsp.config import DataSection
from fedsp.data.chat import end_of_turn, question_ids
from fedsp.data.encoding import IGNORED, collate, encode_choices, encode_contexts, encode_targets
from fedsp.data.files import ClassName, read_rows
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError, DataError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.loop import answer_loss
from support.gguf_made import tiny_llama
from support.small_runs import questions

TICKETS = [
    {"subject": "Printer", "text": "It burns.", "label": "hardware"},
    {"subject": "Password", "text": "I lost it. ", "label": "account"},
    {"subject": "Screen", "text": "Dark {again}.", "label": "hardware"},
]


def rendering(**keys: Any) -> Rendering:
    return Rendering.of(DataSection(**keys))


def test_labels_are_those_of_the_training_examples_or_those_given() -> None:
    how = rendering(task="classification", template="{subject}: {text}\nKind:")
    train = how.examples(TICKETS)
    assert train[1].context == "Password: I lost it. \nKind:"
    assert train[0].choices == (" hardware",) and train[0].gold == (0,)
    known = how.with_labels_of(train)
    test = known.examples(TICKETS)
    assert [example.choices for example in test] == [(" account", " hardware")] * 3
    assert [example.gold for example in test] == [(1,), (0,), (1,)]
    assert {example.metric for example in test} == {"accuracy"}
    given = rendering(task="classification", labels=["hardware", "account", "other"])
    assert given.with_labels_of(train) is given
    assert given.examples([{"text": "x", "label": 1}])[0].target == " account"
    assert given.examples([{"text": "x", "label": "1"}])[0].target == " account", "of a table"
    named = ClassName("Konto")  # as `datasets` has it, under another name
    named.number = 1
    assert given.examples([{"text": "x", "label": named}])[0].target == " account"
    numbered = rendering(task="classification").with_labels_of(
        rendering(task="classification").examples([{"text": "x", "label": one} for one in (2, 3)])
    )
    with pytest.raises(DataError, match="its label is not one of the 2 to choose from"):
        numbered.examples([{"text": "x", "label": 1}])
    with pytest.raises(DataError, match="its label is not one of the 2 to choose from"):
        known.examples([{"subject": "a", "text": "b", "label": 1}])
    numbers = rendering(task="classification", labels=["10", "20"], label="code")
    assert numbers.examples([{"text": "x", "code": 20}])[0].gold == (1,)
    (asked,) = known.questions([{"subject": "a", "text": "b"}])
    assert asked.choices == (" account", " hardware")


@pytest.mark.parametrize(
    ("keys", "row", "sentence"),
    [
        ({"labels": ["a"]}, {"text": "x", "label": "b"}, "its label is not one of the 1 to choose"),
        ({}, {"text": "x"}, r"row 0 has no field 'label': a classification row needs text \(st"),
        ({}, {"text": 3, "label": "a"}, "text is a number, not a string"),
        ({}, {"text": "x", "label": 1.5}, "label is a number with a point, not a text or a wh"),
        ({}, {"text": "x", "label": True}, "label is true or false, not a text or a whole"),
        ({"labels": ["1", "2"]}, {"text": "x", "label": 0}, "its label is not one of the 2"),
        ({"labels": ["1", "b"]}, {"text": "x", "label": 0}, "its label is not one of the 2"),
        ({"labels": ["a", "b"]}, {"text": "x", "label": 2}, "is a place, but there are 2 labels"),
        ({"labels": ["a", "b"]}, {"text": "x", "label": "2"}, "is a place, but there are 2 labels"),
        ({"labels": ["a", "b"]}, {"text": "x", "label": -1}, "its label is not one of the 2"),
        ({}, {"text": "x", "label": " "}, "has no answer: label is empty; fill it in"),
    ],
)
def test_a_row_without_a_label_to_choose_is_refused(
    keys: dict[str, Any], row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        rendering(task="classification", **keys).examples([row])


@pytest.mark.parametrize("template", ["no column", "{", "{text!r}", "{text:>9}", "a } b {text}"])
def test_a_template_names_columns_and_nothing_else(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.template: "):
        rendering(task="classification", template=template).examples(TICKETS)


def test_braces_of_the_text_itself_are_written_twice() -> None:
    (example, *_) = rendering(task="classification", template="{{{text}}}").examples(TICKETS)
    assert example.context == "{It burns.}"


def test_a_column_names_the_task_of_each_row() -> None:
    how = rendering(task="multiple_choice", task_column="kind")
    rows: list[dict[str, Any]] = [
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"kind": "completion", "prompt": "p", "completion": "c"},
        {"kind": "", "question": "q", "choices": ["a", "b"], "answer": 0},
        {"kind": "classification", "text": "t", "label": "l"},
    ]
    found = how.examples(rows)
    assert [(example.task, example.metric) for example in found] == [
        ("multiple_choice", "accuracy"),
        ("completion", "exact_match"),
        ("multiple_choice", "accuracy"),
        ("classification", "accuracy"),
    ]
    with pytest.raises(DataError, match="f.jsonl, line 7: unknown task 'complet'; did you mean"):
        how.examples([{"kind": "complet", "__where__": "f.jsonl, line 7"}])
    with pytest.raises(DataError, match="kind names the task of the row, and is no text"):
        how.examples([{"kind": 3}])


CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|endoftext|>system: Be brief.\n{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
    "{% if message['role'] == 'assistant' %}assistant: {% generation %}{{ message['content'] }}"
    "<|endoftext|>{% endgeneration %}\n"
    "{% else %}{{ message['role'] }}: {{ message['content'] }}<|endoftext|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer(template: str = CHAT) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")
    tokenizer.chat_template = template
    return tokenizer


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHATS = [
    messages(("user", "Who is it?"), ("assistant", " Kelby, I think. ")),
    messages(
        ("system", "Answer in one word."),
        ("user", "Who?"),
        ("assistant", "Kelby"),
        ("user", "Where does she live?"),
        ("assistant", "\nBadiba"),
    ),
    messages(("user", "\u4f60\u597d?"), ("assistant", "\u597d \U0001f642")),
]


def test_answers_are_the_assistant_masks_of_the_template() -> None:
    tokenizer, how = chat_tokenizer(), rendering(task="chat")
    examples = how.examples(CHATS)
    for example, row in zip(examples, CHATS, strict=True):
        (encoded,) = encode_targets(tokenizer, [example], 512)
        batch = collate([encoded])
        theirs = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        length = len(encoded.ids)
        assert list(encoded.ids) == theirs["input_ids"][:length]
        assert not any(theirs["assistant_masks"][length:])
        mask = (batch.labels[0] != IGNORED).int().tolist()
        assert mask == theirs["assistant_masks"][:length]
        assert encoded.asked == sum(mask)


def test_the_loss_is_that_of_a_plain_loop_over_assistant_masks() -> None:
    tokenizer, reference = chat_tokenizer(), tiny_llama()
    model = PromptedLM(tiny_llama(), "tiny")
    found = collate(encode_targets(tokenizer, rendering(task="chat").examples(CHATS), 256))
    total, count = 0.0, 0
    for row in CHATS:
        theirs = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([theirs["input_ids"]])
        labels = ids.masked_fill(torch.tensor([theirs["assistant_masks"]]) == 0, IGNORED)
        asked = int((labels != IGNORED).sum())
        with torch.no_grad():
            total += asked * float(reference(input_ids=ids, labels=labels).loss)
        count += asked
    with torch.no_grad():
        assert float(answer_loss(model, None, found)) == pytest.approx(total / count, rel=1e-5)


def test_the_question_ends_where_the_last_answer_begins() -> None:
    tokenizer = chat_tokenizer()
    (example,) = rendering(task="chat").examples(CHATS[1:2])
    ((choice,),) = encode_choices(tokenizer, [example], 512)
    (asked,) = encode_contexts(tokenizer, [example])
    assert list(choice.ids[: choice.start]) == asked == question_ids(tokenizer, example.turns[:-1])
    assert tokenizer.decode(choice.ids[choice.start :]) == "\nBadiba<|endoftext|>"
    assert choice.silent == ()
    assert end_of_turn(tokenizer) == {tokenizer.eos_token_id}
    refuses = chat_tokenizer("{{ raise_exception('only images') }}")
    assert end_of_turn(refuses) == {refuses.eos_token_id}


def test_a_conversation_that_is_too_long_loses_its_beginning() -> None:
    tokenizer = chat_tokenizer()
    (example,) = rendering(task="chat").examples(CHATS[1:2])
    (whole,) = encode_targets(tokenizer, [example], 512)
    for room in range(8, len(whole.ids) + 1):
        (cut,) = encode_targets(tokenizer, [example], room)
        assert cut.ids == whole.ids[-room:] and cut.dropped == len(whole.ids) - room
        assert cut.start >= 1
        places = set(range(cut.start, len(cut.ids))) - set(cut.silent)
        before = set(range(whole.start, len(whole.ids))) - set(whole.silent)
        assert {place + cut.dropped for place in places} == {
            place for place in before if place > cut.dropped
        }


def test_other_rows_are_conversations_too() -> None:
    how = rendering(task="chat")
    rows: list[dict[str, Any]] = [
        {"instruction": "Translate.", "input": "ja", "output": "yes"},
        {"instruction": "Say yes.", "input": "", "output": "yes"},
        {"prompt": "Say yes.", "completion": "yes", "system": "Be brief."},
        {
            "prompt": [{"role": "user", "content": "Say yes."}],
            "completion": [{"role": "assistant", "content": "yes"}],
        },
    ]
    rows += [
        {"messages": None, "instruction": "", **rows[3]},  # of a table of several layouts
        {"messages": None, "prompt": None, "completion": None, **rows[1]},
        {"system": "Be brief.", **messages(("user", "Say yes."), ("assistant", "yes"))},
    ]
    examples = how.examples(rows)
    assert [example.given for example in examples] == [0, 0, 0, 1, 1, 0, 0]
    asked = [example.turns[:-1] for example in examples]
    assert asked[4:] == [asked[3], asked[1], asked[2]]
    assert asked[:4] == [
        (("user", "Translate.\n\nja"),),
        (("user", "Say yes."),),
        (("system", "Be brief."), ("user", "Say yes.")),
        (("user", "Say yes."),),
    ]
    unanswered = [
        {"instruction": "Say yes."},
        {"prompt": "Say yes."},
        messages(("user", "Say yes.")),
        {"prompt": [{"role": "user", "content": "Say yes."}]},
        rows[3],
    ]
    for question in how.questions(unanswered):
        assert question.turns[:-1] == (("user", "Say yes."),)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (messages(("user", "a")), "the last message is not the assistant's"),
        (messages(("assistant", "a")), "nothing stands before the assistant's first message"),
        ({"messages": "a"}, "messages is a string, not a list"),
        ({"messages": ["a"]}, "one of messages is a string, not an object"),
        ({"messages": []}, "messages is empty"),
        ({"instruction": "", "input": "a", "output": "b"}, "instruction is empty"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": []},
            "completion is empty",
        ),
        (
            {"system": "a", **messages(("system", "b"), ("user", "c"), ("assistant", "d"))},
            "it has a system message twice",
        ),
        ({"instruction": "a", "input": 0, "output": "b"}, "input is a number, not a string"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "one of messages has tool_calls",
        ),
        ({"text": "a"}, r"has no field 'prompt': a chat row needs messages \(a list of"),
        (messages(("user", "a"), ("assistant", " ")), "has no choices, or an empty one"),
    ],
)
def test_rows_that_are_no_conversation_are_refused(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        rendering(task="chat").examples([row])


def test_what_a_template_refuses_is_said_with_its_line(tmp_path: Path) -> None:
    path = questions(
        tmp_path,
        "chats",
        [CHATS[0], messages(("tool", "x"), ("user", "y"), ("assistant", "z"))],
    )
    examples = rendering(task="chat").examples(read_rows(Path(path)))
    with pytest.raises(
        DataError, match=r"chats\.jsonl, line 2: .* refuses the messages \(no such role: tool\)"
    ):
        encode_targets(chat_tokenizer(), examples, 512)
    plain = AutoTokenizer.from_pretrained(EMBEDDED / "model")
    with pytest.raises(DataError, match="has no chat template: take a model that was made for"):
        encode_targets(plain, examples[:1], 512)
    forgets = CHAT.replace(
        "{{ message['content'] }}<|endoftext|>{% endg",
        "{{ message['content'] if loop.last else '...' }}<|endoftext|>{% endg",
    )
    (example,) = rendering(task="chat").examples(CHATS[1:2])
    with pytest.raises(DataError, match="writes message 3 otherwise once others follow: give each"):
        encode_targets(chat_tokenizer(forgets), [example], 512)
    thinks = CHAT.replace("assistant: {% endif %}", "assistant: <think>{% endif %}")
    with pytest.raises(DataError, match="asks for message 2 otherwise than it writes it"):
        encode_targets(chat_tokenizer(thinks), rendering(task="chat").examples(CHATS[:1]), 512)


def test_messages_of_a_prompt_are_read_and_never_trained() -> None:
    """The remedy for templates that write an answer otherwise once others follow it, such as those
    that drop its thoughts."""
    forgets = CHAT.replace(
        "{{ message['content'] }}<|endoftext|>{% endg",
        "{{ message['content'] if loop.last else '...' }}<|endoftext|>{% endg",
    )
    turns = CHATS[1]["messages"]
    (example,) = rendering(task="chat").examples([{"prompt": turns[:4], "completion": turns[4:]}])
    tokenizer = chat_tokenizer(forgets)
    (row,) = encode_targets(tokenizer, [example], 512)
    assert tokenizer.decode(row.ids[row.start :]) == "\nBadiba<|endoftext|>" and not row.silent
    assert "assistant: ...<|endoftext|>" in tokenizer.decode(row.ids[: row.start])
    ((choice,),) = encode_choices(tokenizer, [example], 512)
    assert choice == row
    (every,) = rendering(task="chat").examples([CHATS[1]])
    (plain,) = encode_targets(chat_tokenizer(), [replace(every, given=4)], 512)
    (whole,) = encode_targets(chat_tokenizer(), [every], 512)
    assert plain.ids == whole.ids and plain.asked < whole.asked


def test_plain_examples_and_conversations_keep_their_order() -> None:
    tokenizer = chat_tokenizer()
    plain = [Example(id=str(n), context=f"q{n}", choices=(" a",), gold=(0,)) for n in range(3)]
    chats = rendering(task="chat").examples(CHATS)
    mixed = [plain[0], chats[0], chats[1], plain[1], plain[2], chats[2]]
    whole = encode_targets(tokenizer, mixed, 512)
    assert whole == [encode_targets(tokenizer, [example], 512)[0] for example in mixed]
    labels = collate(whole).labels
    assert torch.equal((labels != IGNORED).sum(dim=1), torch.tensor([row.asked for row in whole]))


def test_a_completion_ends_where_training_is_to_teach_it() -> None:
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "The capital of France is", "completion": "Paris"}]
    ends, open_ended = (
        rendering(task="completion", **keys).examples(rows) for keys in ({}, {"ends": False})
    )
    (whole,) = encode_targets(tokenizer, ends, 64)
    (bare,) = encode_targets(tokenizer, open_ended, 64)
    assert whole.ids == (*bare.ids, tokenizer.eos_token_id) and whole.start == bare.start
    assert encode_choices(tokenizer, ends, 64) == encode_choices(tokenizer, open_ended, 64)
    (cut,) = encode_targets(tokenizer, ends, len(bare.ids))
    assert cut.ids == whole.ids[1:] and (cut.start, cut.dropped) == (bare.start - 1, 1)
    (question,) = rendering().examples([{"question": "q", "choices": ["a"], "answer": 0}])
    assert not question.ends
    tickets = [{"text": "It burns.", "label": "hardware"}]
    (labelled,) = rendering(task="classification").examples(tickets)
    (trained,) = encode_targets(tokenizer, [labelled], 64)
    ((scored,),) = encode_choices(tokenizer, [labelled], 64)
    assert trained.ids == (*scored.ids, tokenizer.eos_token_id)
