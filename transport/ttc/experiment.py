# SPDX-License-Identifier: Apache-2.0
"""Trust the Critics: no generator, but a sequence of critics that samples follow.

Milne, Bilocq and Nachman: "Trust the Critics: Generatorless and Multipurpose WGANs with Initial Convergence Guarantees"
(arXiv 2111.15099) and its successor (arXiv 2211.00820). The parts: critic_sequence.py has the method, critic_store.py
keeps critics, laws.py has the data, and moves.py and misalignment.py carry out the tasks.
"""
from pathlib import Path

from transport.common.study import study_command
from transport.ttc.misalignment import Misalignment, run_misalignment
from transport.ttc.moves import Moves, run_moves
from transport.ttc.settings import Config as Config
from transport.ttc.settings import settled

Result = Moves | Misalignment


def run(config: Config) -> Result:
    """Carry out a task.

    Raises:
        UserError: settings out of range, or a source, target, critic and folder that do not fit each other.
    """
    config = settled(config)
    return run_misalignment(config) if config.task == "misalignment" else run_moves(config)


def draw(result: Result, folder: Path) -> list[Path]:
    """Write the figures of a result."""
    return result.draw(folder)


main = study_command("trust_the_critics", Config, run, draw)
