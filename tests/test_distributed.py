"""python -m pytest tests/test_distributed.py (two processes: tests/train/test_loop.py)"""

import torch

from herdling import distributed


def test_on_one_process_everything_is_the_identity():
    assert not distributed.active()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.arange(3)
    assert distributed.total(tensor) is tensor
    assert distributed.largest(7) == 7
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.barrier()
