"""Prompts as people type them, each with a text around it: not trained on, nor tuned with."""

LETTER = """Dear Mrs Whitlock, the kiln you ordered left Porto this morning on the Santa Rita. She
calls at Vigo and should reach you on the 19th. The customs form is in the blue envelope. We had to
replace the thermocouple, free of charge. With kind regards, Duarte Lopes"""
STANDUP = """Mira: the login page is merged, tests are green
Paul: still fighting the export, the dates come out in UTC
Mira: look at the helper in calendar.js, it has an offset
Paul: nice, and the invoices?
Zoe: customer wants them as PDF, demo is on the 28th"""
PLANTS = """plant | bed | water per week | planted
leek | 3 | 4 l | April
chard | 1 | 6 l | May
dill | 3 | 2 l | April
okra | 5 | 7 l | June"""
FABLE = """A heron told the frogs that the pond would dry up by midsummer and offered to carry them,
one at a time, to the lake behind the mill. The youngest frog asked why the heron had grown so fat.
That evening the frogs held a council under the willow and stayed where they were; it rained."""
SQL = """select c.name, sum(o.amount) as spent
from customers c join orders o on o.customer_id = c.id
where o.placed_at >= date '2024-01-01'
group by c.name having sum(o.amount) > 500;"""
PAIRS = """cold: hot
early: late
narrow: wide
noisy:"""

AFTER, BEFORE = "after", "before"

LOCALIZATION = [
    (LETTER, AFTER, "where did I put the customs form? it says so in there"),
    (LETTER, AFTER, "What's the name of the ship?"),
    (LETTER, AFTER, "which part did they swap for free"),
    (LETTER, BEFORE, "Tell me the arrival date given in this letter."),
    (LETTER, AFTER, "who signed it?"),
    (STANDUP, AFTER, "which file has the offset bug"),
    (STANDUP, AFTER, "when is the demo?"),
    (STANDUP, AFTER, "what format did the customer ask for"),
    (STANDUP, AFTER, "Is Paul done with the export?"),
    (STANDUP, BEFORE, "Who finished the login page? See the notes."),
    (PLANTS, AFTER, "how much water does okra need?"),
    (PLANTS, AFTER, "in which bed is the chard"),
    (PLANTS, AFTER, "what was planted in may?"),
    (FABLE, AFTER, "where did the frogs meet?"),
    (FABLE, AFTER, "what did the heron claim about the pond"),
    (FABLE, AFTER, "which frog doubted the heron?"),
    (SQL, AFTER, "from what date on are orders counted"),
    (SQL, AFTER, "which column links orders to customers?"),
    (SQL, AFTER, "what's the minimum amount?"),
    ("", AFTER, "who was the first woman in space"),
]
AGGREGATION = [
    (LETTER, AFTER, "shorten to a text message"),
    (LETTER, AFTER, "translate into Portuguese"),
    (LETTER, BEFORE, "Please summarise the letter below."),
    (LETTER, AFTER, "write an answer in the same tone"),
    (STANDUP, AFTER, "minutes please"),
    (STANDUP, AFTER, "make a bullet list of all open points"),
    (STANDUP, AFTER, "what did the team get done overall?"),
    (STANDUP, BEFORE, "Write a status report from these notes."),
    (STANDUP, AFTER, "tldr"),
    (PLANTS, AFTER, "how much water do all the plants need together"),
    (PLANTS, AFTER, "sort by water"),
    (PLANTS, AFTER, "describe the garden"),
    (FABLE, AFTER, "what's the moral of the story?"),
    (FABLE, AFTER, "retell it as a news item"),
    (FABLE, AFTER, "give me a two-line summary"),
    (SQL, AFTER, "explain the query"),
    (SQL, AFTER, "convert it to pandas"),
    (SQL, BEFORE, "Can you improve this?"),
    (PAIRS, AFTER, ""),
    ("", AFTER, "compose a birthday poem for my uncle"),
]


def prompts() -> list[tuple[str, str]]:
    """(prompt, label) pairs."""
    return [
        ("\n\n".join([text, request] if place == AFTER else [request, text]).strip(), label)
        for label, rows in (("localization", LOCALIZATION), ("aggregation", AGGREGATION))
        for text, place, request in rows
    ]
