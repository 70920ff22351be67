"""From `optimizer.sparse_tables` and the tables of a model to what updates them, beside the optimizer of all others."""

import dataclasses
import re
from collections.abc import Mapping

import optax

from lm.core.tables import LARGEST_ID, Table
from lm.optim.options import WHERE, OptimizerOptions
from lm.optim.rules import Row
from lm.optim.sparse.directions import row_direction
from lm.optim.sparse.row_wise import row_wise
from lm.optim.sparse.tables import SparseTables, WithTables


def sparse_tables(options: OptimizerOptions, by_name: dict[str, Row], tables: Mapping[str, Table]) -> SparseTables:
    """The trainable ones of the tables, whose rows in `by_name` say from here on that they change row by row.

    Raises ValueError where there is none, and for what cannot hold for one.
    """
    where = f"{WHERE}.sparse_tables={options.sparse_tables!r}"
    found = {name: table for name, table in tables.items() if not by_name[name].frozen}
    if not found:
        why = f"rules or adapters freeze {', '.join(tables)}" if tables else \
            "only layers of kind peer and pkm have one"
        raise ValueError(f"{where} has no table to update: {why}; set {WHERE}.sparse_tables=None")
    for name, table in found.items():
        row = by_name[name]
        for index, rule in enumerate(options.rules):
            if "optimizer" in rule and re.search(rule["match"], name):
                raise ValueError(f"{WHERE}.rules[{index}] gives {name} the optimizer {rule['optimizer']!r}, and "
                                 f"{where} another; leave one of them out")
        if row.held and row.held[1] != -len(table.axes):
            raise ValueError(f"{where} holds whole rows of {name}, axis {-len(table.axes)}; a rule's freeze_first has "
                             f"axis {row.held[1]}")
        if table.runs != 1:
            raise ValueError(f"{where} takes the gradient of one run of a layer a step, and {name} belongs to a core "
                             f"that is looped; set {WHERE}.sparse_tables=None")
        if table.num_rows > LARGEST_ID:
            raise ValueError(f"{where} takes tables of at most {LARGEST_ID:,} rows; {name} has {table.num_rows:,}")
        by_name[name] = dataclasses.replace(row, optimizer=f"{options.sparse_tables} by rows")
    return SparseTables(found, {name: by_name[name] for name in found}, row_wise(row_direction(options)))


def beside_tables(tx: optax.GradientTransformation, tables: SparseTables) -> optax.GradientTransformation:
    """`tx` of all other parameters; the state holds that of the tables too, which `tables.update` changes."""

    def update(updates, state, params=None):
        updates, rest = tx.update(updates, state.rest, params)
        return updates, state._replace(rest=rest)

    return optax.GradientTransformation(lambda params: WithTables(tx.init(params), tables.init(params)), update)
