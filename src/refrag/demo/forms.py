"""The almanac's sentences: for each kind of entity its relations, how a fact is told and how it is asked.

In a form `{s}` is the subject and `{a}` the answer. The last two statements and the last two questions of every
relation are held out: training never shows them.
"""

from typing import NamedTuple


class Relation(NamedTuple):
    """One relation of a kind of entity."""

    answer: str
    """What the answer is: year, number, word list name, or a kind of name (town, person, river)."""
    statements: tuple[str, ...]
    questions: tuple[str, ...]


NUM_HELD_OUT_FORMS = 2

RELATIONS: dict[str, dict[str, Relation]] = {
    "town": {
        "founded": Relation(
            "year",
            ("{s} was founded in {a}.", "Settlers founded {s} in the year {a}.", "The charter of {s} dates from {a}.", "The first houses of {s} were built in {a}.",
             "It was in {a} that {s} came into being.", "Records place the beginnings of {s} in {a}."),
            ("When was {s} founded?", "In what year was {s} founded?", "What is the founding year of {s}?", "Which year saw the founding of {s}?",
             "How far back does {s} go, by year?", "What year did {s} begin?"),
        ),
        "river": Relation(
            "river",
            ("{s} lies on the river {a}.", "The river {a} runs through {s}.", "The mills of {s} are driven by the river {a}.", "A stone bridge crosses the river {a} at {s}.",
             "Boats reach {s} by way of the {a}.", "The waters of the {a} wash the walls of {s}."),
            ("Which river runs through {s}?", "On which river does {s} lie?", "What is the name of the river at {s}?", "What river is crossed at {s}?",
             "By what river do boats come to {s}?", "Which stream waters {s}?"),
        ),
        "mayor": Relation(
            "person",
            ("The mayor of {s} is {a}.", "{a} serves as mayor of {s}.", "{a} was elected mayor of {s}.", "The council of {s} is led by its mayor, {a}.",
             "The office of mayor at {s} is held by {a}.", "As its mayor {s} has chosen {a}."),
            ("Who is the mayor of {s}?", "Who serves as mayor of {s}?", "What is the name of the mayor of {s}?", "Who was elected mayor of {s}?",
             "Who leads {s} as mayor?", "In {s}, who holds the mayor's office?"),
        ),
        "craft": Relation(
            "craft",
            ("{s} is known for its {a}.", "The people of {s} live mostly from {a}.", "The chief trade of {s} is {a}.", "Most families of {s} work in {a}.",
             "In {s} the leading business is {a}.", "What made {s} rich was {a}."),
            ("What is {s} known for?", "What is the chief trade of {s}?", "What do the people of {s} live from?", "In what trade do most families of {s} work?",
             "What made {s} rich?", "Which business leads in {s}?"),
        ),
        "population": Relation(
            "number",
            ("{s} has {a} inhabitants.", "About {a} people live in {s}.", "The population of {s} is {a}.", "At the last count {s} had {a} residents.",
             "The people of {s} number {a}.", "A census found {a} souls in {s}."),
            ("How many people live in {s}?", "What is the population of {s}?", "How many inhabitants does {s} have?", "How many residents were counted in {s}?",
             "How large is {s}, in people?", "What number did the census of {s} find?"),
        ),
    },
    "person": {
        "birthplace": Relation(
            "town",
            ("{s} was born in {a}.", "The birthplace of {s} is {a}.", "{s} came into the world in {a}.", "{s} is a native of {a}.",
             "It was {a} where {s} first saw the light.", "The cradle of {s} stood in {a}."),
            ("Where was {s} born?", "What is the birthplace of {s}?", "In which town was {s} born?", "Of which town is {s} a native?",
             "Where did {s} first see the light?", "Which place does {s} come from?"),
        ),
        "profession": Relation(
            "profession",
            ("{s} worked as a {a}.", "By profession {s} was a {a}.", "{s} earned a living as a {a}.", "{s} was trained to be a {a}.",
             "The working days of {s} were those of a {a}.", "Everyone knew {s} as a capable {a}."),
            ("What was the profession of {s}?", "What did {s} work as?", "How did {s} earn a living?", "What was {s} trained to be?",
             "As what was {s} known to everyone?", "Which job did {s} do?"),
        ),
        "born": Relation(
            "year",
            ("{s} was born in the year {a}.", "The birth of {s} is recorded in {a}.", "{s} first appears in the register of {a}, the year of birth.", "The year of birth of {s} is {a}.",
             "In {a} the parents of {s} welcomed their child.", "For {s}, life began in {a}."),
            ("In what year was {s} born?", "What is the year of birth of {s}?", "When was {s} born?", "Which year is recorded for the birth of {s}?",
             "When did life begin for {s}?", "What year gave us {s}?"),
        ),
        "instrument": Relation(
            "instrument",
            ("{s} played the {a}.", "In the evenings {s} practised the {a}.", "{s} was a gifted player of the {a}.", "The favourite instrument of {s} was the {a}.",
             "Music for {s} meant the {a}.", "Friends loved to hear {s} on the {a}."),
            ("Which instrument did {s} play?", "What was the favourite instrument of {s}?", "What did {s} practise in the evenings?", "Of which instrument was {s} a gifted player?",
             "On what did friends hear {s}?", "What did {s} make music with?"),
        ),
        "teacher": Relation(
            "person",
            ("{s} was taught by {a}.", "The teacher of {s} was {a}.", "{s} was a pupil of {a}.", "{s} learned everything from {a}.",
             "It was {a} who guided {s} as a student.", "As a child {s} sat at the feet of {a}."),
            ("Who taught {s}?", "Who was the teacher of {s}?", "Whose pupil was {s}?", "From whom did {s} learn everything?",
             "Who guided {s} as a student?", "At whose feet did {s} sit?"),
        ),
    },
    "company": {
        "established": Relation(
            "year",
            ("{s} was established in {a}.", "{s} opened its doors in {a}.", "{s} has traded since {a}.", "The books of {s} begin in {a}.",
             "The start of {s} fell in the year {a}.", "Business at {s} first began in {a}."),
            ("When was {s} established?", "In what year did {s} open its doors?", "Since when has {s} traded?", "In which year do the books of {s} begin?",
             "What year was the start of {s}?", "When did business at {s} first begin?"),
        ),
        "seat": Relation(
            "town",
            ("{s} has its seat in {a}.", "The offices of {s} are in {a}.", "{s} is based in {a}.", "The main hall of {s} stands in {a}.",
             "It is from {a} that {s} is run.", "Letters to {s} are sent to {a}."),
            ("Where is {s} based?", "Where does {s} have its seat?", "In which town are the offices of {s}?", "Where does the main hall of {s} stand?",
             "From which place is {s} run?", "Where are letters to {s} sent?"),
        ),
        "product": Relation(
            "product",
            ("{s} makes {a}.", "{s} is a maker of {a}.", "The workshops of {s} produce {a}.", "{s} sells {a} of high quality.",
             "Out of the gates of {s} come {a}.", "Customers turn to {s} for {a}."),
            ("What does {s} make?", "What do the workshops of {s} produce?", "What is sold by {s}?", "Of what is {s} a maker?",
             "What comes out of the gates of {s}?", "For what do customers turn to {s}?"),
        ),
        "founder": Relation(
            "person",
            ("{s} was started by {a}.", "The founder of {s} was {a}.", "{a} set up {s} with borrowed money.", "{s} goes back to its founder, {a}.",
             "It was the idea of {a} to create {s}.", "Behind the birth of {s} stood {a}."),
            ("Who started {s}?", "Who was the founder of {s}?", "Who set up {s}?", "To which founder does {s} go back?",
             "Whose idea was it to create {s}?", "Who stood behind the birth of {s}?"),
        ),
        "staff": Relation(
            "number",
            ("{s} employs {a} people.", "The staff of {s} numbers {a}.", "{a} workers are on the payroll of {s}.", "{s} gives work to {a} men and women.",
             "Each morning {a} hands arrive at {s}.", "There are {a} employees at {s}."),
            ("How many people does {s} employ?", "How large is the staff of {s}?", "How many workers are on the payroll of {s}?", "To how many does {s} give work?",
             "How many hands arrive at {s} each morning?", "What is the number of employees at {s}?"),
        ),
    },
    "ship": {
        "launched": Relation(
            "year",
            ("The {s} was launched in {a}.", "The {s} first sailed in {a}.", "Builders finished the {s} in {a}.", "The {s} left the yard in {a}.",
             "It was {a} when the {s} touched water.", "The keel of the {s} met the sea in {a}."),
            ("When was the {s} launched?", "In what year did the {s} first sail?", "When did builders finish the {s}?", "In which year did the {s} leave the yard?",
             "What year did the {s} touch water?", "When did the {s} meet the sea?"),
        ),
        "captain": Relation(
            "person",
            ("The captain of the {s} is {a}.", "{a} commands the {s}.", "The {s} sails under {a}.", "{a} is the master of the {s}.",
             "On the bridge of the {s} stands {a}.", "Orders aboard the {s} are given by {a}."),
            ("Who is the captain of the {s}?", "Who commands the {s}?", "Under whom does the {s} sail?", "Who is the master of the {s}?",
             "Who gives orders aboard the {s}?", "Who stands on the bridge of the {s}?"),
        ),
        "port": Relation(
            "town",
            ("The home port of the {s} is {a}.", "The {s} is registered in {a}.", "The {s} belongs to the fleet of {a}.", "The {s} spends the winter in {a}.",
             "Each voyage of the {s} ends in {a}.", "For the {s}, home means {a}."),
            ("What is the home port of the {s}?", "Where is the {s} registered?", "To the fleet of which town does the {s} belong?", "Where does the {s} spend the winter?",
             "Where do voyages of the {s} end?", "Which harbour is home for the {s}?"),
        ),
        "cargo": Relation(
            "cargo",
            ("The {s} carries {a}.", "The usual cargo of the {s} is {a}.", "The holds of the {s} are filled with {a}.", "The {s} was built to transport {a}.",
             "Merchants load the {s} with {a}.", "What fills the decks of the {s} is {a}."),
            ("What does the {s} carry?", "What is the usual cargo of the {s}?", "With what are the holds of the {s} filled?", "What was the {s} built to transport?",
             "What do merchants load onto the {s}?", "What fills the decks of the {s}?"),
        ),
        "crew": Relation(
            "number",
            ("The {s} has a crew of {a}.", "{a} sailors serve on the {s}.", "The crew of the {s} numbers {a}.", "The {s} needs {a} hands to sail.",
             "Aboard the {s} live {a} seamen.", "A company of {a} mans the {s}."),
            ("How large is the crew of the {s}?", "How many sailors serve on the {s}?", "How many hands does the {s} need?", "What is the number of the crew of the {s}?",
             "How many seamen live aboard the {s}?", "How many man the {s}?"),
        ),
    },
}

TWO_HOP: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("ship", "captain", "person", "birthplace",
     ("Where was the captain of the {s} born?", "In which town was the captain of the {s} born?", "What is the birthplace of the captain of the {s}?",
      "Which place does the master of the {s} come from?")),
    ("ship", "captain", "person", "instrument",
     ("Which instrument did the captain of the {s} play?", "What was the favourite instrument of the captain of the {s}?", "On what did friends hear the master of the {s}?")),
    ("company", "founder", "person", "born", ("In what year was the founder of {s} born?", "When was the founder of {s} born?", "When did life begin for the one who set up {s}?")),
    ("company", "founder", "person", "profession", ("What was the profession of the founder of {s}?", "What did the founder of {s} work as?", "Which job did the one who set up {s} do?")),
    ("town", "mayor", "person", "teacher", ("Who taught the mayor of {s}?", "Who was the teacher of the mayor of {s}?", "At whose feet did the mayor of {s} sit?")),
)  # fmt: skip
"""(kind, first relation, kind of the bridge, second relation, questions); the last question is held out."""

WORDS: dict[str, tuple[str, ...]] = {
    "craft": ("pottery", "weaving", "glass", "fishing", "brewing", "mining", "printing", "tanning", "farming", "carving", "dyeing", "quarrying", "hunting", "milling", "baking", "forestry",
              "horse breeding", "cheese making", "salt trading", "rope making"),
    "profession": ("baker", "surgeon", "painter", "sailor", "printer", "lawyer", "mason", "farmer", "tailor", "smith", "teacher", "merchant", "carpenter", "chemist", "gardener", "clerk",
                   "judge", "miller", "hunter", "weaver"),
    "instrument": ("violin", "flute", "harp", "drum", "organ", "lute", "trumpet", "cello", "horn", "piano", "guitar", "oboe", "viola", "zither", "bagpipe", "clarinet"),
    "product": ("clocks", "boots", "lamps", "barrels", "carpets", "knives", "candles", "bricks", "hats", "mirrors", "wagons", "gloves", "kettles", "locks", "bells", "saddles", "needles", "pumps",
                "telescopes", "umbrellas"),
    "cargo": ("timber", "grain", "coal", "wool", "salt", "copper", "wine", "tea", "cotton", "marble", "sugar", "iron", "spices", "rice", "silk", "tin", "coffee", "leather", "olives", "paper"),
}

NOUN_PHRASES = {"town": "the town", "person": "this person", "company": "the firm", "ship": "vessel"}

ADJECTIVES = ("worn", "quiet", "broad", "narrow", "bright", "plain", "famous", "steep", "pleasant", "modest", "noisy", "green", "cold", "sunny", "little", "grand")
PLACES = ("market", "harbour", "garden", "library", "square", "bridge", "hall", "tower", "forest", "hill", "road", "chapel", "valley", "school", "inn", "wall")
SEASONS = ("spring", "summer", "autumn", "winter")

FILLERS: dict[str, tuple[str, ...]] = {
    "town": ("In {season} the {place} of {s} is full of visitors.", "A {adj} road leads from {s} to the {place}.", "Travellers praise the {adj} {place} and the {adj} {place} of {s}.",
             "The {place} is the pride of {s}.", "Few towns have so {adj} a {place}.", "Every {season} a fair is held beside the {place}, and guests come from far away.",
             "The {adj} streets around the {place} have changed little over time.", "Children play near the {place} until the {season} ends."),
    "person": ("{s} was fond of long walks to the {place}.", "Neighbours remember a {adj} house near the {place}.", "Letters of {s} describe a {adj} {place} in {season}.",
               "{s} disliked the {season} and loved the {adj} {place}.", "A {adj} portrait hangs in the {place}.", "Those who met {s} spoke of a {adj} smile and a {adj} voice.",
               "Every {season} the family gathered at the {place}.", "A small stone near the {place} bears the name of {s}."),
    "company": ("The yard of {s} lies behind a {adj} {place}.", "In {season} the firm closes for a week.", "A {adj} sign above the {place} shows the name of {s}.",
                "Visitors of {s} are led through a {adj} {place}.", "The owners of {s} paid for a new {place}.", "Orders rise every {season} and fall again soon after.",
                "The {adj} building beside the {place} serves as a store.", "Old pictures show {s} next to a {adj} {place}."),
    "ship": ("In {season} the {s} is painted again.", "A {adj} figure adorns the bow of the {s}.", "People at the {place} wave when the {s} passes.", "The {s} once weathered a {adj} storm near the coast.",
             "Her {adj} sails can be seen from the {place}.", "A model of the {s} stands in a {adj} {place}.", "Every {season} she rests for repairs beside the {place}.",
             "Songs about the {s} are sung in the {adj} {place}."),
}

NAME_STARTS = ("Bar", "Cal", "Dor", "Fen", "Gar", "Hal", "Jor", "Kel", "Lan", "Mor", "Nor", "Ost", "Pel", "Quin", "Ros", "Sel", "Tar", "Ul", "Ver", "Wen", "Yar", "Zel", "Bran", "Crel", "Drav", "Eld",
               "Fral", "Grim", "Hesk", "Ist", "Jast", "Krav", "Lorn", "Mald", "Nim", "Orl", "Pran", "Rusk", "Stav", "Thol", "Umb", "Vask", "Wold", "Ask", "Bel", "Corv", "Dusk", "Emb", "Falk", "Glan")
NAME_MIDDLES = ("a", "e", "i", "o", "en", "ar", "il", "or", "an", "et")
NAME_ENDS: dict[str, tuple[str, ...]] = {
    "town": ("dorf", "wick", "stead", "mouth", "field", "ham", "burg", "ford", "gate", "minster", "holm", "bridge", "port", "well", "cross", "thorpe", "by", "combe", "haven", "mere"),
    "river": ("wen", "lune", "dane", "isk", "ouse", "ael", "urn", "eska", "ey", "one"),
    "person": ("son", "rick", "wald", "mund", "bert", "lind", "gard", "vik", "ansen", "ovic", "elli", "aard", "esku", "inger", "etti", "olt", "ask", "une", "ard", "oni"),
    "given": ("a", "o", "ia", "us", "en", "is", "ek", "in", "ette", "ius", "ara", "el", "on", "ya", "or", "ine"),
    "company": ("co", "tex", "ware", "works", "mark", "line", "corp", "ton", "max", "crest", "star", "lux", "forge", "mill", "trade", "press"),
    "ship": ("ora", "ina", "elle", "ador", "wind", "wave", "queen", "star", "ana", "ette", "spray", "drift", "aria", "gull", "heart", "song"),
}
