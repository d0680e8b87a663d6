"""What a generation leaves for the next one: the second turn of a chat runs only new text."""

from torch import Tensor

from .decoder import Decoder
from .engine.cache import KVCache
from .engine.scheduler import Scheduler
from .errors import OptionError


class AdaptiveCache:
    """The keys and values of one finished text, to be given as `past_key_values` with a longer one.

    Whatever the two texts have in common is not run again. It can be continued once, because
    continuing writes into it; the output of the next generation has the next one.
    """

    def __init__(self, scheduler: Scheduler, ids: Tensor):
        """Keep what has been run.

        Args:
            scheduler: of the finished generation, with its pending tokens.
            ids: [time], the whole text; its last token has not been run.
        """
        self._scheduler: Scheduler | None = scheduler
        self._ids = ids

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that need not be run again; the name transformers asks by."""
        return len(self._ids) - 1

    def take(self, decoder: Decoder, ids: Tensor) -> KVCache:
        """Hand over the cache, cut to what it has in common with the text `ids` [time].

        Raises:
            OptionError: it is another model's, or has been continued before.
        """
        if self._scheduler is None:
            raise OptionError(
                "these past_key_values have been continued already; give those of the newest "
                "output, or leave past_key_values out."
            )
        if self._scheduler.decoder is not decoder:
            raise OptionError(
                "these past_key_values are another model's; leave past_key_values out."
            )
        scheduler, self._scheduler = self._scheduler, None
        # Pending tokens belong to the old queues; the new ones may stand at other layers.
        scheduler.flush()
        # One token at least has to be run for there to be a readout.
        most = min(self.get_seq_length(), len(ids) - 1)
        differing = (self._ids[:most] != ids[:most].to(self._ids.device)).nonzero()
        scheduler.cache.truncate(int(differing[0]) if len(differing) else most)
        return scheduler.cache
