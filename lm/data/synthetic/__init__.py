"""Rows that are made, not read. To add a task: its file, and its line here."""

from lm.data.synthetic.copy_chain import CopyChain
from lm.data.synthetic.facts import Facts
from lm.data.synthetic.mqar import MQAR
from lm.data.synthetic.passkey import Passkey
from lm.data.synthetic.recital import Recital
from lm.data.synthetic.selective_copy import SelectiveCopy
from lm.data.synthetic.style_pairs import StylePairs
from lm.data.synthetic.word_problem import WordProblem

TASKS = {"copy_chain": CopyChain, "facts": Facts, "mqar": MQAR, "passkey": Passkey, "recital": Recital,
         "selective_copy": SelectiveCopy, "style_pairs": StylePairs, "word_problem": WordProblem}
