"""The exit codes of every command. 75 is EX_TEMPFAIL of sysexits.h: try the same command again."""

from typing import Final

DONE: Final = 0
FAULT: Final = 1
WRONG_INPUT: Final = 2
STOPPED: Final = 75  # stopped early; the same command resumes

# By the values of `emoverse.training.outcome.Outcome`, which imports torch.
OF_OUTCOME: Final = {
    "done": DONE,
    "stopped": STOPPED,
    "lost_peer": FAULT,
    "fault": FAULT,
    "wrong_input": WRONG_INPUT,
}
