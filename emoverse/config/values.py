"""Values of the config as people write them: rates, lists of a single word, locations of shards.

In: what YAML or an override holds. Out: the checked value, or a ValueError with the rule. These are
the field types of `schema.py`. No torch.
"""

from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from data_shards.plan.rates import check_rates
from data_shards.shards.fetch import is_remote
from data_shards.tasks import TASKS, Task
from emoverse.config.yaml_source import ExactFloat

MAX_DENOMINATOR = 10_000  # of one rate, so that the order of tasks stays a small table


def parse_rate(value: object) -> Fraction:
    """A share of samples, exactly as written: `2/5`, `'0.4'` and `0.4` are the same Fraction.

    Raises ValueError for anything else, below 0, above 1, or finer than 1/10000.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Fraction)):
        raise ValueError("a rate is a fraction such as 2/5 or a decimal such as 0.4")
    # The decimal text of a float, never its binary value: 0.4 is 2/5.
    text = value.text if isinstance(value, ExactFloat) else str(value)
    try:
        rate = Fraction(text)
    except ZeroDivisionError:
        raise ValueError("the denominator of a rate must not be 0") from None
    except ValueError:
        raise ValueError("a rate is a fraction such as 2/5 or a decimal such as 0.4") from None
    if not 0 <= rate <= 1:
        raise ValueError("a rate lies between 0 and 1")
    if rate.denominator > MAX_DENOMINATOR:
        raise ValueError(
            f"the denominator of a rate is at most {MAX_DENOMINATOR}, this one has "
            f"{rate.denominator}; write a simpler fraction such as {rate.limit_denominator(100)}"
        )
    return rate


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _place(value: object) -> object:
    return Path(value) if isinstance(value, str) and not is_remote(value) else value


def _fill_tokens(given: dict[Task, int]) -> dict[Task, int]:
    return {task: given.get(task, DEFAULT_NEW_TOKENS[task]) for task in TASKS}


# Room for the longest correct answer of each task, in tokens of the coarsest of our tokenizers.
DEFAULT_NEW_TOKENS = {Task.MSA: 8, Task.ER: 8, Task.FER: 96, Task.ERI: 160, Task.ECPE: 96}

TaskKey = Annotated[Task, Field(strict=False)]
Rate = Annotated[
    Fraction, BeforeValidator(parse_rate), PlainSerializer(str, return_type=str, when_used="json")
]
Rates = Annotated[dict[TaskKey, Rate], AfterValidator(check_rates)]
NewTokens = Annotated[dict[TaskKey, Annotated[int, Field(ge=1)]], AfterValidator(_fill_tokens)]
Names = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(_one_or_many)]
LoosePath = Annotated[Path, Field(strict=False)]
# An address stays text: a Path would fold its double slash.
ShardPlace = Annotated[str | Path, BeforeValidator(_place)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    Field(strict=False),
]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
