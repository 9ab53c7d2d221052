"""Where rows of a data set come from (`data/records.py` reads them)."""

from megatron_r1.config.section import Section

Scalar = str | int | float | bool


class RecordsSection(Section):
    """The keys of a source; tasks over a data set take them beside their own."""

    source: str
    """`data/train.jsonl`, `data/train.parquet`, `./folder` or a hub id (see the top of `data/records.py`)."""
    name: str | None = None
    """A dataset's configuration, where it has several."""
    split: str | None = None
    """A dataset's split; None = `train`."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; None = its newest."""
    columns: dict[str, str] = {}
    """Field of the task -> the column that holds it, where the names differ."""
    where: dict[str, Scalar | list[Scalar]] = {}
    """Column -> the value, or the list of values, that a row must have there; other rows are left out."""
