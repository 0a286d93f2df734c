"""Prompts of two kinds, made from phrases: what the task classifier is trained on.

Localization: the answer stands in one place of the text (a fact, a name, a line). Aggregation:
the whole text is needed (a summary, a count, a continuation, a label learnt from examples).
The filler is text of Python's own library: prose of its manual, and its source code.
"""

import inspect
import json
import re
import string
import textwrap
from collections.abc import Callable
from pydoc_data.topics import topics
from random import Random

PROSE = [text for _, text in sorted(topics.items()) if len(text) > 2000]
CODE = [inspect.getsource(module) for module in (inspect, json, re, string, textwrap)]

THINGS = (
    "invoice contract manual handbook policy report letter transcript article novel lecture "
    "patent ruling recipe itinerary log specification memo survey paper chapter thread ticket"
).split()
FACTS = (
    "the delivery date|the phone number of the office|the name of the author|the access code|"
    "the price of the licence|the capital of the province|the highest temperature|"
    "the room number|the serial number of the pump|the maximum payload|"
    "the person who signed it|the deadline|the city where they met|the colour of the door|"
    "the year of the first edition|the port number|the dosage for children|"
    "the second author's university|the secret word|the interest rate"
).split("|")
PEOPLE = "Anna Marek Wei Fatima Joao Ingrid Tomas Aisha Pierre Yuki Samuel Nadia".split()

SENTENCES = [
    "Nobody knew where {person} had gone when the {thing} came.",
    "He asked her who had written the {thing}, and what it meant.",
    "She said that {person} was the one who found {fact} in the garden.",
    "It was {person} who paid for it, with {number} coins and a smile.",
    "They met in the old house on the hill, where they had lived as children.",
    "Which of them was right did not matter to him anymore.",
    "When the rain stopped, {person} took the {thing} and left for the station.",
    "I will tell you why: because of {fact}.",
    "We moved the meeting to {number} o'clock, please bring the {thing}.",
    "What a day! How they laughed about {person}.",
    "His sister kept all of the letters in a box under the bed.",
    "Everyone in the village had heard the story of {person} and the {thing}.",
    "The {thing} has {number} pages, and most of it is about the whole family.",
    "In total {number} people came, and each wrote a line in the book.",
    "Do you remember {person}? She works there now.",
    "All items are in stock; the next delivery is on Friday.",
]

LOCALIZATION = [
    "What is {fact}?",
    "What is {fact} according to the {thing}?",
    "Based on the {thing} above, what is {fact}? Answer in a few words.",
    "Answer the question using only the {thing}. Question: what was {fact}? Answer:",
    "Find {fact} in the {thing} and reply with it only.",
    "Extract {fact} from the {thing}.",
    "Which paragraph of the {thing} mentions {fact}? Reply with its number.",
    "Look up {fact}. Return the exact value.",
    "Who told {person} about {fact}?",
    "When did {person} first read the {thing}?",
    "Where does the {thing} say that {person} lived?",
    "In which section is {fact} given?",
    "How much did {person} pay for the {thing}?",
    "Did {person} sign the {thing}? Answer yes or no.",
    "Quote the sentence that states {fact}.",
    "What does {person} call {fact} in the {thing}?",
    "Which of the documents answers this question: what is {fact}?",
    "Read the passage and answer: who is {person}?",
    "Where is the function that computes {fact} defined?",
    "Which line of the code raises the error?",
    "What value does the key '{key}' have in the data?",
    "Tell me the value stored under {key}.",
    "There is a special number hidden in the text. What is the special number for {key}?",
    "One sentence of the {thing} is about {person}. What does it say?",
    "How old was {person} when the {thing} was written?",
    "Why did {person} refuse {fact}?",
    "Question: which company employed {person}?\nAnswer:",
    "Please locate {fact} for me.",
    "Give me the email address of {person}.",
    "On what date was the {thing} filed?",
    "Is {fact} mentioned anywhere? If so, where?",
    "Which city is {person} from?",
    "Name the person responsible for the {thing}.",
    "What did {person} answer when asked about {fact}?",
    "Retrieve the record whose id is {key}.",
    "The abstract below belongs to one of these paragraphs. Which one is it?",
    "what's {fact}",
    "where's {person} from?",
    "who is in charge of the {thing}?",
    "which one has {fact}?",
    "how many {thing}s does {person} own?",
    "how long did {person} wait?",
    "how far is it to {person}'s house",
    "why was the {thing} returned",
    "why can't {person} open the {thing}?",
    "what time does {person} arrive?",
    "what kind of {thing} is it?",
    "what happened to {person} on Monday?",
    "does {person} know {fact}?",
    "has the {thing} been paid",
    "can you tell me {fact}?",
    "do you see {fact} anywhere in there?",
    "I only need {fact}, it is in the {thing} somewhere.",
    "I am looking for {fact}.",
    "check the {thing} for {fact}",
    "what does this say about {person}",
    "which method opens the file",
    "which class is the parent of this one?",
    "where is this variable set",
    "what is the default of this argument?",
    "what does the function return when the list is empty?",
    "whose {thing} is this?",
    "what was it that {person} forgot",
    "who invented the {thing}?",
    "in what year was {person} born",
    "at which step of the {thing} is {fact} needed?",
]
AGGREGATION = [
    "Summarize the {thing}.",
    "Write a summary of the {thing} in {number} sentences.",
    "Summarise the following {thing} for a busy reader.",
    "Write a one-page summary of the {thing}. Summary:",
    "Give an overview of the whole {thing}.",
    "What are the main points of the {thing}?",
    "List the key takeaways.",
    "What are the overall themes of the {thing}?",
    "Write minutes of the meeting in {number} bullet points.",
    "Condense this {thing} to {number} words.",
    "Describe the general tone and sentiment of the {thing}.",
    "How many different people appear in the {thing} in total?",
    "Count how many unique paragraphs there are.",
    "What are the {number} most frequent words in the text?",
    "List all names that occur in the {thing}.",
    "Collect every date in the {thing} into a table.",
    "Complete the code.",
    "Next line of code:",
    "Continue the following code; write only the next line.",
    "Please finish the function below.",
    "Continue the story in the same style.",
    "Classify the last example as in the examples above. Type:",
    "Here are some examples of questions and their types. Type:",
    "Label the sentiment of the final review, as in the previous ones. Sentiment:",
    "Here are {number} dialogues with their summaries. Summary:",
    "Translate the {thing} into French.",
    "Rewrite the {thing} in plain language.",
    "Write an abstract for this {thing}.",
    "Draft a news headline and a lead that cover the {thing}.",
    "Compare the views expressed throughout the {thing}.",
    "Make an outline of the {thing} with its sections.",
    "Write a report about everything that happened.",
    "Rate the quality of the {thing} as a whole and explain why.",
    "What can be concluded from all of these documents together?",
    "Create a timeline of all events of the {thing}.",
    "Review this code and list all problems.",
    "Explain what the program does overall.",
    "Sort the items by their totals.",
    "tldr",
    "tl;dr",
    "sum this up",
    "sum up the {thing} for me",
    "recap please",
    "the short version please",
    "give me the gist of it",
    "in a nutshell?",
    "short synopsis of the {thing}",
    "what is this {thing} about?",
    "what's the overall message of the {thing}",
    "how do people feel about it overall",
    "shorten this",
    "make it half as long",
    "rephrase all of it",
    "say it in simpler words",
    "translate this to Spanish",
    "turn this into a poem",
    "turn the {thing} into slides",
    "write the next sentence",
    "write the rest",
    "write a reply to this",
    "add comments to the code",
    "port the code to another language",
    "refactor this code",
    "walk me through the whole {thing}",
    "go through everything and tell me what changed",
    "total of all rows?",
    "add up all the numbers",
    "average over all entries",
    "group them by type",
    "sort all of these",
    "rank every entry",
    "put everything in a table",
    "retell it in {number} lines",
    "describe this",
    "proofread the {thing}",
    "what do all of these have in common?",
    "brainstorm titles for the {thing}",
    "write a review of the {thing}",
]
ASKED = (
    "who {did}|who was it that {did}|which {thing} {did}|which of them {did}|"
    "when was it that {person} {did}|where is the {noun}|where did {person} put the {noun}|"
    "what day is the {noun}|what colour is the {noun}|how many {noun}s are left|"
    "how much is the {noun}|how many {noun}s do we have|what is the {noun} called|"
    "what did {person} say about the {noun}|why did {person} {do}|when does {person} {do}|"
    "does {person} {do}|at what time did {person} {do}|who {do}s there|"
    "how often does {person} {do}|what is {person}'s {noun}|which {noun} is broken|"
    "whose {noun} is it"
).split("|")
DID = (
    "sent the {thing}|keeps the {noun}|has the {noun} now|paid for the {noun}|"
    "has not answered yet|called on Friday|wrote this|lost the {noun}|came first|"
    "owns the {noun}|is at fault|won|has the highest price|brought the {noun}|"
    "asked for more time|runs the {noun}|left early"
).split("|")
DO = "leave work wait pay travel call return sleep win cook sing apologise resign".split()
NOUNS = (
    "key car house shop boat school lamp table dog train kitchen bill ticket address meeting "
    "result server file variable module argument exception test version name room price "
    "box cup window"
).split()
POLITE = (
    "|||hey, |quick question: |please tell me |I need to know |do you know |remind me, "
).split("|")
VERBS = (
    "summarize|sum up|condense|recap|rewrite|rephrase|translate|outline|shorten|simplify|"
    "analyse|describe|explain|review|compare|rank|sort|group|classify|label|evaluate|"
    "boil down|go over|break down|count|list|collect|continue|complete|extend|improve|"
    "correct|convert|expand on|comment on|report on|draw conclusions from|make a summary of|"
    "write a short version of|write a paragraph about|make a list of|give me an overview of|"
    "give an idea of"
).split("|")
OBJECTS = (
    "this|it all|the text|the above|everything|all of it|the whole {thing}|all {thing}s|"
    "the entire conversation|the discussion|these notes|all the rows|the class|"
    "the whole file|what they said|every part of the {thing}|the story|all the {noun}s|"
    "the following|what happened|the code"
).split("|")
WAYS = (
    "||| in {number} words| briefly| for a child| in German| as a list| as an email|, please"
).split("|")


def phrases(rng: Random, count: int) -> list[tuple[str, str]]:
    """(label, phrase): those written out above, and `count` of each kind put together."""
    written = [("localization", phrase) for phrase in LOCALIZATION]
    written += [("aggregation", phrase) for phrase in AGGREGATION]
    made = []
    for _ in range(count):
        asked = rng.choice(ASKED).replace("{did}", rng.choice(DID)).replace("{do}", rng.choice(DO))
        made.append(("localization", rng.choice(POLITE) + asked + rng.choice(["", "?", "?"])))
        order = rng.choice(VERBS) + " " + rng.choice(OBJECTS) + rng.choice(WAYS)
        made.append(("aggregation", rng.choice(["", "", "", "please ", "can you "]) + order))
    return written * 3 + made


OPENINGS = [
    "You are a helpful assistant.",
    "You are given a {thing}.",
    "Read the {thing} below carefully.",
    "Below is a {thing}.",
    "The following text is a {thing}.",
    "Context:",
    "Document:",
    "Here is the {thing}:",
    "",
    "",
]


def chat(rng: Random, text: str) -> str:
    """A text as if two people typed it."""
    names = rng.sample(PEOPLE, 2)
    sentences = re.split(r"[.?!]\s", text)
    return "\n".join(f"{rng.choice(names)}: {sentence}" for sentence in sentences)


def make(rng: Random, label: str, phrase: str) -> str:
    """One prompt: the request `phrase` before a text, after it, or in both places."""
    words: dict[str, Callable[[], str]] = {
        "thing": lambda: rng.choice(THINGS),
        "fact": lambda: rng.choice(FACTS),
        "person": lambda: rng.choice(PEOPLE),
        "key": lambda: "".join(rng.choices(string.ascii_lowercase + string.digits, k=8)),
        "noun": lambda: rng.choice(NOUNS),
        "number": lambda: str(rng.randint(2, 20)),
    }

    def filled(phrase: str) -> str:
        return re.sub(r"{(\w+)}", lambda match: words[match[1]](), phrase)

    request = filled(phrase)
    is_code = re.search(r"\b(code|function|line|program)\b", request) and rng.random() < 0.8
    source = rng.choice(CODE if is_code else PROSE)
    start = rng.randrange(max(1, len(source) - 1500))
    filler = source[start : start + rng.choice([0, 200, 800, 3000, 6000])]
    if rng.random() < 0.1:
        filler = json.dumps({words["key"](): words["key"]() for _ in range(40)})
    elif rng.random() < 0.5:
        filler = " ".join(filled(rng.choice(SENTENCES)) for _ in range(rng.randint(3, 40)))
    if rng.random() < 0.2:
        filler = chat(rng, filler)
    opening = filled(rng.choice(OPENINGS))
    place = rng.random()
    parts = [opening, filler, request] if place < 0.7 else [request, filler]
    if place > 0.9:
        parts = [opening, request, filler, request]
    return "\n\n".join(part for part in parts if part)
