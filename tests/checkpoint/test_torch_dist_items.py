"""The items of a `.distcp` file are to the byte what `torch.save` writes."""

from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.torch_dist import PartWriter
from megatron_r1.model.sharding import Piece
from tests.checkpoint.test_torch_dist import WHOLE, saved


@pytest.mark.parametrize("shape", [(300, 70), (1, 3, 4), (5,), (), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_an_item_is_what_torch_saves(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    writer = PartWriter(tmp_path / "part.distcp")
    writer.put(Piece("k", shape, (0,) * len(shape), shape), tensor)
    writer.close()
    assert (tmp_path / "part.distcp").read_bytes() == saved(tensor)


def test_a_piece_in_blocks(tmp_path: Path) -> None:
    box, blocks = Piece("k", (12, 6), (0, 0), (12, 6)), WHOLE[0].split(5)
    for name, put in {"whole": [WHOLE[0]], "blocks": blocks}.items():
        writer = PartWriter(tmp_path / name)
        writer.put_rows(box, torch.bfloat16, put)
        writer.close()
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes() == saved(WHOLE[0].clone())
    for wrong, message in [(blocks[:2], "instead of"), ((*blocks, blocks[0]), "instead of"), ([WHOLE.half()], "among")]:
        with pytest.raises(ValueError, match=message):
            PartWriter(tmp_path / "part").put_rows(box, torch.bfloat16, wrong)
