"""The preference losses that a config may name in `loss`. To add one: a class as `lm.losses.preference.base` describes
it, and its line here."""

from lm.losses.preference.kto import Kto
from lm.losses.preference.odds import Orpo
from lm.losses.preference.ratio import Dpo, Ipo, Slic
from lm.losses.preference.reference_free import Cpo, SimPo

PREFERENCE = {"orpo": Orpo, "dpo": Dpo, "ipo": Ipo, "simpo": SimPo, "cpo": Cpo, "kto": Kto, "slic": Slic}
