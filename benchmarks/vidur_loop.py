"""Runs inside Vidur's own Python: one Vidur simulation, with Vidur's own options, and times its loop.

The last line of its output is JSON. Nothing of gLLM is imported here.
"""

import json
import os
import sys
import time


def main() -> None:
    """Build the simulation that the options describe, run it, print what it took."""
    del sys.path[0]  # this folder, where `vidur` would be the script beside this one
    from vidur.config import SimulationConfig  # noqa: PLC0415 - Vidur is there only when this is called
    from vidur.entities import Batch  # noqa: PLC0415
    from vidur.simulator import Simulator  # noqa: PLC0415
    from vidur.utils.random import set_seeds  # noqa: PLC0415

    started = time.process_time()
    config = SimulationConfig.create_from_cli_args()
    set_seeds(config.seed)
    simulator = Simulator(config)  # trains its predictor the first time, then reads it from its cache
    ready = time.process_time()
    simulator.run()
    ended = time.process_time()
    num_iterations = Batch.generate_id()  # ids count from 0, so the next one is how many there were
    print(json.dumps({"setup_s": ready - started, "loop_s": ended - ready, "num_iterations": num_iterations}))
    sys.stdout.flush()
    os._exit(0)  # Vidur would write its plots on the way out


if __name__ == "__main__":
    main()
