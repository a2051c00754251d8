"""Whether a state can be loaded from a checkpoint: all that it asks for is there."""

from __future__ import annotations

import difflib

from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan

from cloudckpt.backends.errors import ConfigurationError


class FittingPlanner(DefaultLoadPlanner):
    """DCP's planner, which says in an error of this library what is asked for in vain."""

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads.

        Raises:
            ConfigurationError: the checkpoint has no value of a name.
        """
        try:
            return super().create_local_plan()
        except RuntimeError as error:
            there = self.metadata.state_dict_metadata if self.metadata is not None else {}
            lacking = [name for name in self.state_dict if name not in there]
            if not lacking:
                raise
            near = difflib.get_close_matches(lacking[0], there, n=3, cutoff=0.6) or list(there)[:3]
            named = ", ".join(map(repr, near)) + (", …" if len(there) > len(near) else "")
            raise ConfigurationError(
                f"the state asks for {lacking[0]!r}{_more(lacking)}, which the checkpoint does not have",
                hint=f"It has {named}. Build the state that was saved, or leave out what is not there",
            ) from error


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""
