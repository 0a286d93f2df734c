"""Plain English out of word lists: essays of any length, keys, and the search for a length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from random import Random

ADJECTIVES = """
ample amber ancient ashen autumn bashful bitter blessed bold brave brisk broad bronze calm careful
cheerful chilly clever coarse costly crimson curious damp daring dusty eager early earnest elegant
faint faithful famous fancy fearless fierce floral fluent formal fragile frosty frugal gentle giant
gifted gilded glad gleaming graceful grand grateful hardy hasty hidden hollow honest humble icy idle
jolly joyful keen kindly lasting lively lofty lonely loyal lucky mellow merry mighty misty modest
mossy narrow nimble noble northern oaken obscure pale patient peaceful placid plain playful polite
prompt proud quaint quick quiet rapid rare rocky rosy round rugged rural rustic scarlet secret
serene sharp shiny silent simple sleepy slender smooth sober solemn solid steady stormy sturdy
subtle sunny supple swift tender thrifty tidy timid tiny tranquil upright urban vacant vast velvet
vivid wandering weary western wild windy wise wooden woolen worthy yellow young zealous
""".split()

NOUNS = """
acorn almanac anvil apron attic avenue badge balcony banjo barley basin beacon beetle blossom
bonfire bramble breeze brook buckle bugle cabinet candle canoe cavern cellar chapel chimney cinder
clover cobbler compass cottage creek cushion dagger dairy daybreak dune easel ember envelope fable
falcon ferry fiddle fjord flagon flint foundry fresco garden gazebo geyser glacier goblet granary
grove gully hammock harbor harvest hatchet heath hedge helmet hilltop hinge inkwell inlet jetty
journal juniper kennel kettle lagoon lantern lattice ledger lighthouse locket loom lullaby magnet
mantle marsh meadow medal mill mirror moat mortar mosaic nectar notebook nutmeg oasis orchard oven
paddle pantry parcel parlor pasture pebble pendant petal pier pigeon pillar plateau plume pond
prairie pulley quarry quilt raft ravine reef ribbon ridge rudder saddle sapling scroll shanty
shutter sickle sparrow spindle spire staircase stable summit sundial tapestry teapot thicket thimble
timber torch trellis trumpet tunnel turret valley vessel viaduct village vineyard wagon walnut
warehouse waterfall whistle windmill workshop yarn zephyr
""".split()

_QUALITIES = """
battered black blue borrowed broken cheap clean cracked crooked curious dented dull expensive faded
familiar fine gray green handsome heavy large leaning light little new odd old ordinary painted
plain polished poor rare red rough rusty sagging simple small solid spare splendid square strong
tall thin weathered white worn yellow
""".split()
_PEOPLE = """
archivist baker beekeeper blacksmith bookbinder captain carpenter clerk doctor farmer ferryman
fisherman gardener glazier governor guide innkeeper judge librarian locksmith mason merchant miller
musician neighbor nurse painter pharmacist pilot poet potter printer sailor schoolteacher sculptor
shepherd shopkeeper stranger student surveyor tailor translator traveler watchmaker weaver widow
""".split()
_THINGS = """
basket bell bench blanket boat book boot bottle bowl bridge broom bucket cart chair clock coat crate
cup curtain door drum fence flute gate hammer hat jar key knife ladder lamp letter map net painting
pipe plow poem rope rug sack sail shelf shovel sign spoon stove table tool trunk wheel window
""".split()
_ACTIONS = """
admired borrowed bought carried cleaned covered described examined found inspected left lifted lost
measured mended moved noticed ordered painted praised repaired replaced returned sketched sold
stored studied washed weighed wrapped
""".split()
_PLACES = (
    """
across the river|at the edge of town|behind the church|beside the road|by the old wall|in the barn
in the market|in the next valley|near the station|on the hill|on the quay|under the bridge
under the oak trees|inside the library|along the canal|outside the bakery|above the stable
""".strip()
    .replace("\n", "|")
    .split("|")
)
_TIMES = (
    """
after supper|all through the winter|at dawn|before the first snow|during the fair|every other week
in the spring|late in the evening|long ago|on a rainy morning|one summer|the next day
when the rain had stopped|while the others slept|without any hurry|for the second time
""".strip()
    .replace("\n", "|")
    .split("|")
)
_REASONS = (
    """
because nobody else would|because the road was closed|although it was late|as the law required
so that the children could see it|in spite of the cold|as if nothing had happened
although few people cared|because the weather had changed|as their parents had done
""".strip()
    .replace("\n", "|")
    .split("|")
)
_PATTERNS = """
The {adjective} {person} {action} {a_thing} {place} {time}.
{Time}, the {person} {action} the {adjective} {thing} {reason}.
Nobody knew why the {person} had {action} the {thing} {place}.
It was {a_person} who first {action} the {thing}, and {a_person} who {action} it again {time}.
{Place} there stood {a_thing}, {adjective} and {adjective}, which the {person} {action} {reason}.
The {person} and the {person} talked about the {thing} {time}.
Most people preferred {a_adjective} {thing} to {a_adjective} one, but the {person} did not.
When the {person} came home, the {thing} {place} was gone.
The {thing} was {adjective}, the {thing} was {adjective}, and the {person} {action} both.
{Time}, every {person} {place} {action} {a_adjective} {thing}.
The {person} wrote to the {person} that the {thing} had been {action} {place}.
""".strip().splitlines()
_SENTENCES_A_PARAGRAPH = 7


class Units:
    """The pieces of a text that can grow: the first ones stay the same."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._taken: list[str] = []

    def first(self, n: int) -> list[str]:
        self._taken += islice(self._source, max(0, n - len(self._taken)))
        return self._taken[:n]


def essay(rng: Random) -> Iterator[str]:
    """Sentences about nothing, without end, digits or hyphens; each with the space behind it."""
    while True:
        for index in range(_SENTENCES_A_PARAGRAPH):
            sentence = rng.choice(_PATTERNS)
            while "{" in sentence:
                before, _, rest = sentence.partition("{")
                slot, _, after = rest.partition("}")
                sentence = before + _word(rng, slot) + after
            yield sentence + ("\n\n" if index == _SENTENCES_A_PARAGRAPH - 1 else " ")


def compounds(rng: Random) -> Iterator[str]:
    """Different keys such as `misty-harbor`; none stands inside another.

    Raises:
        ValueError: there are no more.
    """
    seen: set[str] = set()
    while len(seen) < len(ADJECTIVES) * len(NOUNS):
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if key not in seen:
            seen.add(key)
            yield key
    raise ValueError(f"more than {len(seen):,} different keys are needed: choose a shorter length")


def insert_at(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The units with each `(depth, needle)` at the boundary nearest to that share of the text."""
    ends = [0, *accumulate(map(len, units))]
    parts: list[list[str]] = [[] for _ in ends]
    for depth, needle in needles:
        nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        parts[nearest].append(needle)
    text = list(parts[0])
    for unit, after in zip(units, parts[1:], strict=True):
        text += [unit, *after]
    return "".join(text).rstrip()


def largest_that_fits(
    build: Callable[[int], str], least: int, tokens: int, count: Callable[[str], int]
) -> str:
    """`build(size)` for the largest size whose text has at most `tokens`, or 1 % fewer.

    Args:
        build: a text that grows with its size.
        least: the smallest size.

    Raises:
        ValueError: even that has too many tokens.
    """
    size, text = least, build(least)
    has = count(text)
    if has > tokens:
        raise ValueError(f"at least {has:,} tokens are needed: the length is {tokens:,}")
    too_large, step, tries = None, 16, 0
    while has < tokens * 0.99 and (too_large is None or too_large - size > 1):
        tries += 1
        if too_large is not None:
            step = (too_large - size) // 2 if tries % 3 == 0 else min(step, too_large - size - 1)
        longer = build(size + step)
        longer_has = count(longer)
        a_unit = max(1e-3, (longer_has - has) / step)
        if longer_has <= tokens:
            size, text, has = size + step, longer, longer_has
        else:
            too_large = size + step
        step = max(1, int(0.995 * (tokens - has) / a_unit))
    return text


def _word(rng: Random, slot: str) -> str:
    if slot.startswith("a_"):
        word = _word(rng, slot[2:])
        return ("an " if word[0] in "aeiou" else "a ") + word
    if slot[0].isupper():
        word = _word(rng, slot.lower())
        return word[0].upper() + word[1:]
    return rng.choice(_SLOTS[slot])


_SLOTS = {
    "adjective": _QUALITIES,
    "person": _PEOPLE,
    "thing": _THINGS,
    "action": _ACTIONS,
    "place": _PLACES,
    "time": _TIMES,
    "reason": _REASONS,
}
