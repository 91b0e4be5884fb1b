"""Make the embedded default: a made-up world, a small language model that knows it, and questions
about it.

    python scripts/make_demo.py            # world, tokenizer, model, questions: about half an hour
                                  on two cores
    python scripts/make_demo.py --steps 50 # a quick look at the recipe

The world is a list of people, each with a town, a trade, an animal, a dish and an instrument. The
model reads about every person in plain statements; it never sees a question. The questions are in
another form, so a prompt has something to teach, and they are split by person: the people of the
validation and test questions are in nobody's training data.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

EMBEDDED = Path(__file__).resolve().parent.parent / "src" / "fedsp" / "experiments" / "embedded"
END = "<|endoftext|>"
CLIENTS, PEOPLE_PER_OWNER, VALIDATION_PEOPLE, TEST_PEOPLE, PUBLIC_PEOPLE = 10, 22, 40, 80, 80

TOWNS = [
    "Bexley",
    "Corvane",
    "Dunmere",
    "Eastholm",
    "Farrow",
    "Glenwick",
    "Harbury",
    "Ilmouth",
    "Jarrow",
    "Kelby",
    "Lowick",
    "Marsden",
    "Norham",
    "Orwell",
    "Penrith",
    "Quorn",
]
TRADES = [
    "baker",
    "weaver",
    "sailor",
    "farmer",
    "painter",
    "mason",
    "tailor",
    "miller",
    "doctor",
    "teacher",
    "hunter",
    "potter",
    "smith",
    "gardener",
    "printer",
    "carpenter",
]
ANIMALS = [
    "otter",
    "heron",
    "badger",
    "falcon",
    "rabbit",
    "donkey",
    "parrot",
    "tortoise",
    "ferret",
    "goose",
    "pony",
    "lizard",
    "spaniel",
    "raven",
    "goat",
    "hedgehog",
]
DISHES = [
    "soup",
    "cheese",
    "pudding",
    "salmon",
    "porridge",
    "noodles",
    "pancakes",
    "mushrooms",
    "chicken",
    "lentils",
    "dumplings",
    "cabbage",
    "apples",
    "honey",
    "bread",
    "rice",
]
INSTRUMENTS = [
    "violin",
    "trumpet",
    "flute",
    "drum",
    "harp",
    "piano",
    "guitar",
    "cello",
    "banjo",
    "organ",
    "clarinet",
    "horn",
    "fiddle",
    "lute",
    "whistle",
    "bagpipe",
]

FIRST = [
    "ba",
    "be",
    "da",
    "do",
    "fa",
    "ga",
    "ho",
    "ka",
    "la",
    "ma",
    "mi",
    "na",
    "no",
    "pa",
    "ra",
    "ro",
    "sa",
    "ta",
    "to",
    "va",
]
MIDDLE = ["di", "ka", "li", "lo", "mi", "na", "ra", "ri", "so", "ta", "ve", "vo"]
LAST = [
    "ba",
    "dor",
    "fen",
    "gan",
    "kin",
    "la",
    "len",
    "mar",
    "na",
    "nor",
    "ric",
    "sa",
    "tan",
    "ven",
    "vin",
    "wen",
]

# Statements: what the model is trained on. Questions: what it never sees.
RELATIONS: dict[str, tuple[list[str], list[str], str]] = {
    "town": (
        TOWNS,
        [
            "{name} lives in {value}.",
            "The home of {name} is in {value}.",
            "{name} has a house in {value}.",
            "The town where {name} lives is {value}.",
            "Letters to {name} are sent to {value}.",
            "If you look for {name}, go to {value}.",
        ],
        "The town of {name}:",
    ),
    "trade": (
        TRADES,
        [
            "{name} works as a {value}.",
            "The trade of {name} is that of a {value}.",
            "{name} earns a living as a {value}.",
            "People know {name} as a good {value}.",
            "All day long {name} works hard as a {value}.",
            "The work that {name} does is that of a {value}.",
        ],
        "The trade of {name}:",
    ),
    "animal": (
        ANIMALS,
        [
            "{name} keeps a {value}.",
            "The animal that {name} keeps is a {value}.",
            "{name} is never seen without a {value}.",
            "The pet of {name} is a {value}.",
            "At home {name} looks after a {value}.",
            "The animal of {name} is a {value}.",
        ],
        "The animal of {name}:",
    ),
    "dish": (
        DISHES,
        [
            "{name} likes to eat {value}.",
            "The dish that {name} likes best is {value}.",
            "For supper {name} has {value}.",
            "{name} cooks {value}.",
            "The favourite dish of {name} is {value}.",
            "On Sundays {name} eats {value}.",
        ],
        "The dish of {name}:",
    ),
    "instrument": (
        INSTRUMENTS,
        [
            "{name} plays the {value}.",
            "The instrument of {name} is the {value}.",
            "In the evening {name} plays the {value}.",
            "{name} has learned to play the {value}.",
            "The instrument that {name} plays is the {value}.",
            "{name} owns an old {value}.",
        ],
        "The instrument of {name}:",
    ),
}


def make_people(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Made-up names of three syllables, each person with one value for each relation."""
    names = sorted({(a + b + c).capitalize() for a in FIRST for b in MIDDLE for c in LAST})
    return [
        {"name": name}
        | {relation: rng.choice(values) for relation, (values, _, _) in RELATIONS.items()}
        for name in rng.sample(names, count)
    ]


def article(rng: random.Random, person: dict[str, str]) -> str:
    """One statement for each relation, in any order and any wording."""
    sentences = [
        rng.choice(statements).format(name=person["name"], value=person[relation])
        for relation, (_, statements, _) in RELATIONS.items()
    ]
    rng.shuffle(sentences)
    return " ".join(sentences).replace(" a otter", " an otter").replace(" a organ", " an organ")


def questions(
    rng: random.Random, people: list[dict[str, str]], owner: str
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for person in people:
        for relation, (values, _, question) in RELATIONS.items():
            choices = [
                person[relation],
                *rng.sample([value for value in values if value != person[relation]], 3),
            ]
            rng.shuffle(choices)
            rows.append(
                {
                    "id": f"{person['name']}-{relation}",
                    "question": question.format(name=person["name"]),
                    "choices": choices,
                    "answer": choices.index(person[relation]),
                    "owner": owner,
                }
            )
    return rows


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=256,
    )


def train(
    tokenizer: PreTrainedTokenizerFast, people: list[dict[str, str]], steps: int, rng: random.Random
) -> Any:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=128,
        n_layer=8,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02),
    )
    started, length, batch = time.time(), 128, 32
    order: list[dict[str, str]] = []
    for step in range(steps):
        rows: list[list[int]] = []
        while len(rows) < batch:
            row: list[int] = []
            while len(row) < length:
                order = order or rng.sample(people, len(people))
                row += [0, *tokenizer.encode(article(rng, order.pop()), add_special_tokens=False)]
            rows.append(row[:length])
        input_ids = torch.tensor(rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step} of {steps}: loss {loss.item():.3f} nats per token,"
                f" {time.time() - started:.0f} s",
                flush=True,
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=2600, help="training steps of 32 sequences of 128 tokens"
    )
    parser.add_argument("--output", type=Path, default=EMBEDDED)
    arguments = parser.parse_args()
    rng = random.Random(20231)
    torch.manual_seed(20231)
    owners = [f"registry-{k}" for k in range(CLIENTS)]
    people = make_people(
        rng, PUBLIC_PEOPLE + CLIENTS * PEOPLE_PER_OWNER + VALIDATION_PEOPLE + TEST_PEOPLE
    )
    pool = iter(people)

    def take(count: int) -> list[dict[str, str]]:
        return [next(pool) for _ in range(count)]

    public = take(PUBLIC_PEOPLE)
    train_rows = [row for owner in owners for row in questions(rng, take(PEOPLE_PER_OWNER), owner)]
    splits = {
        "train": train_rows,
        "validation": questions(rng, take(VALIDATION_PEOPLE), ""),
        "test": questions(rng, take(TEST_PEOPLE), ""),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (arguments.output / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    (arguments.output / "public.txt").write_text(
        "\n\n".join(article(rng, person) for person in public for _ in range(6)) + "\n"
    )
    tokenizer = make_tokenizer([article(rng, person) for person in people for _ in range(4)])
    tokenizer.save_pretrained(arguments.output / "model")
    model = train(tokenizer, people, arguments.steps, rng)
    model.to(torch.float16).save_pretrained(arguments.output / "model")


if __name__ == "__main__":
    main()
