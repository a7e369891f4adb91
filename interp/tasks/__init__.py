"""What can a model be asked? The `Task` and one generator a kind of prompt."""

from interp.tasks.coloured_objects import coloured_objects
from interp.tasks.corpus import Corpus, Windows, corpus, generated
from interp.tasks.facts import country_capital, landmark_country
from interp.tasks.greater_than import YearSets, greater_than, year_sets
from interp.tasks.in_context import in_context
from interp.tasks.induction import induction
from interp.tasks.injection import Injections, injections
from interp.tasks.ioi import ioi
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.occupations import Occupations, occupations
from interp.tasks.relations import Relation, Relations, relations
from interp.tasks.task import Task
from interp.tasks.text import text
from interp.tasks.two_hop import two_hop, two_hop_chains, two_hop_facts, two_hop_split

__all__ = [
    "Corpus",
    "Injections",
    "Occupations",
    "Relation",
    "Relations",
    "Task",
    "Windows",
    "YearSets",
    "coloured_objects",
    "corpus",
    "country_capital",
    "generated",
    "greater_than",
    "in_context",
    "induction",
    "injections",
    "ioi",
    "landmark_country",
    "multiple_choice",
    "occupations",
    "relations",
    "text",
    "two_hop",
    "two_hop_chains",
    "two_hop_facts",
    "two_hop_split",
    "year_sets",
]
