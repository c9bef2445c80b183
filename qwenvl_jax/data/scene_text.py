"""Words of the scenes' questions: what is written on pictures, and how things are named and asked for.

Tables only; which question is asked, and what its answer is, stands in `questions.py`.
"""

WORDS = (  # noqa: SIM905 (a word list reads better as a text)
    """AT BE BY DO GO HE HI IF IN IS IT ME MY NO OF OK ON OR SO TO UP US WE
    ACE ANT ARM ART BAG BAT BED BEE BIG BIT BOX BOY BUS CAB CAN CAP CAR CAT COW CUP CUT DAY DEN DIG DOG DOT DRY EAR EAT
    EGG END EYE FAN FAR FIG FIN FIX FLY FOG FOX FUN GAS GEM GUM HAT HEN HOT HUT ICE INK JAM JAR JET JOB JOY KEY KID KIT
    LAB LEG LID LIP LOG MAN MAP MAT MIX MUD NET NEW NUT OAK OIL OLD ONE OWL PAN PEN PET PIE PIG PIN POT RAT RED RUN SEA
    SKY SUN TAP TEA TEN TIN TOP TOY TWO VAN WAX WAY WEB WET YES ZIP ZOO
    BALL BARN BEAR BELL BIRD BLUE BOAT BOOK BUSH CAKE CAMP CITY CLUB COAT COIN CORN CUBE DEER DESK DOOR DUCK EAST EXIT
    FARM FISH FIVE FLAG FOUR FROG GATE GIFT GOAT GOLD HAND HILL HOME HORN IRON JAZZ JUMP KING KITE LAKE LAMP LEAF LION
    LOVE MILK MOON NEST NINE NOTE OPEN OVEN PARK PATH PEAR QUIZ RAIN RING ROAD ROCK ROOF ROSE SALE SALT SAND SHIP SHOE
    SHOP SNOW SONG STAR STOP TAXI TENT TIME TREE VASE WAVE WEST WIND WOLF WOOD YARD YEAR ZERO ZONE"""
).split()
LANGUAGES = ("en", "zh")

CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形",
    "star": "星形", "cross": "十字形", "diamond": "菱形",
    "small": "小", "large": "大", "object": "物体",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面", "larger": "大", "smaller": "小",
    "yes": "是", "no": "不是", "both": "都有", "neither": "都没有",
}  # fmt: skip

# {ref}, {a}, {b}: "red circle"; {thing}: "a red circle"; {things}: "red circles"; {x}, {y}: two answers;
# {box}: a box.
QUESTIONS = {
    "color": {
        "en": (
            "What color is the {ref}?",
            "What is the color of the {ref}?",
            "Which color is the {ref}?",
            "Which color does the {ref} have?",
            "Tell me the color of the {ref}.",
            "Name the color of the {ref}.",
        ),
        "zh": ("{ref}是什么颜色？", "图中的{ref}是什么颜色？", "{ref}的颜色是什么？", "说出{ref}的颜色。"),
    },
    "shape": {
        "en": (
            "What shape is the {ref}?",
            "What is the shape of the {ref}?",
            "Which shape is the {ref}?",
            "Which shape does the {ref} have?",
            "Tell me the shape of the {ref}.",
            "Name the shape of the {ref}.",
        ),
        "zh": ("{ref}是什么形状？", "图中的{ref}是什么形状？", "{ref}的形状是什么？", "说出{ref}的形状。"),
    },
    "size": {
        "en": (
            "Is the {ref} large or small?",
            "Is the {ref} small or large?",
            "What size is the {ref}?",
            "What is the size of the {ref}?",
            "Which size does the {ref} have?",
            "Tell me the size of the {ref}.",
        ),
        "zh": ("{ref}是大还是小？", "图中的{ref}是大还是小？", "{ref}是小还是大？", "说出{ref}的大小。"),
    },
    "count": {
        "en": (
            "How many {things} are there?",
            "How many {things} are in the picture?",
            "How many {things} do you see?",
            "How many {things} can you find?",
            "Count the {things}.",
            "What is the number of {things}?",
        ),
        "zh": ("有几个{things}？", "图中有几个{things}？", "图中有多少个{things}？", "数一数{things}。"),
    },
    "exist": {
        "en": (
            "Is there {thing}?",
            "Is there {thing} in the picture?",
            "Do you see {thing}?",
            "Can you find {thing}?",
            "Does the picture show {thing}?",
            "Does the picture have {thing}?",
        ),
        "zh": ("有{ref}吗？", "图中有{ref}吗？", "图中有没有{ref}？", "你看到{ref}了吗？"),
    },
    "read": {
        "en": (
            "What does the text say?",
            "Read the text.",
            "What is written in the picture?",
            "What text do you see?",
            "Which text is in the picture?",
            "Tell me what is written.",
        ),
        "zh": ("图中写着什么？", "图中的文字是什么？", "读出图中的文字。", "写的是什么？"),
    },
    "read_word": {
        "en": ("What word is written?", "Which word is in the picture?", "Read the word.", "What is the word?"),
        "zh": ("图中的单词是什么？", "读出图中的单词。"),
    },
    "read_number": {
        "en": ("What number is written?", "Which number is in the picture?", "Read the number.", "What is the number?"),
        "zh": ("图中的数字是什么？", "读出图中的数字。"),
    },
    "caption": {
        "en": (
            "Describe the picture.",
            "What is in the picture?",
            "What do you see?",
            "What does the picture show?",
            "Tell me what you see.",
            "List the objects in the picture.",
        ),
        "zh": ("描述这张图片。", "图中有什么？", "你看到了什么？", "图中有哪些东西？"),
    },
    "ground": {
        "en": (
            "Where is the {ref}?",
            "Find the {ref}.",
            "Locate the {ref}.",
            "Show me the {ref}.",
            "Give the box of the {ref}.",
            "Draw a box around the {ref}.",
        ),
        "zh": ("{ref}在哪里？", "找出{ref}。", "框出{ref}。", "{ref}的位置在哪里？"),
    },
    "inside": {
        "en": (
            "What is inside {box}?",
            "What is in {box}?",
            "What do you see in {box}?",
            "What does {box} show?",
            "Which object is in {box}?",
            "Name the object in {box}.",
        ),
        "zh": ("{box}里面是什么？", "{box}中有什么？", "{box}里的物体是什么？", "说出{box}里的物体。"),
    },
}

# For each axis the two answers and the questions; the yes/no questions of the same axis name one direction.
RELATIONS = {
    "horizontal": ("left", "right"),
    "vertical": ("above", "below"),
    "size": ("larger", "smaller"),
}
RELATION_QUESTIONS = {
    "horizontal": {
        "en": (
            "Is the {a} {x} or {y} of the {b}?",
            "Is the {a} to the {x} or to the {y} of the {b}?",
            "Is the {a} on the {x} or on the {y} of the {b}?",
            "On which side of the {b} is the {a}, {x} or {y}?",
            "Where is the {a}, {x} or {y} of the {b}?",
            "Tell me if the {a} is {x} or {y} of the {b}.",
        ),
        "zh": ("{a}在{b}的{x}还是{y}？", "图中的{a}在{b}的{x}还是{y}？", "{a}位于{b}的{x}还是{y}？"),
    },
    "vertical": {
        "en": (
            "Is the {a} {x} or {y} the {b}?",
            "Is the {a} {x} the {b} or {y} it?",
            "Do you see the {a} {x} or {y} the {b}?",
            "Where is the {a}, {x} or {y} the {b}?",
            "Tell me if the {a} is {x} or {y} the {b}.",
            "Does the {a} stand {x} or {y} the {b}?",
        ),
        "zh": ("{a}在{b}的{x}还是{y}？", "图中的{a}在{b}的{x}还是{y}？", "{a}位于{b}的{x}还是{y}？"),
    },
    "size": {
        "en": (
            "Is the {a} {x} or {y} than the {b}?",
            "Is the {a} {x} than the {b} or {y}?",
            "Compared with the {b}, is the {a} {x} or {y}?",
            "Would you call the {a} {x} or {y} than the {b}?",
            "Tell me if the {a} is {x} or {y} than the {b}.",
            "Does the {a} look {x} or {y} than the {b}?",
        ),
        "zh": ("{a}比{b}{x}还是{y}？", "图中的{a}比{b}{x}还是{y}？", "{a}比{b}更{x}还是更{y}？"),
    },
}
RELATION_YESNO_QUESTIONS = {
    "horizontal": {
        "en": ("Is the {a} {x} of the {b}?", "Is the {a} to the {x} of the {b}?", "Do you see the {a} {x} of the {b}?"),
        "zh": ("{a}在{b}的{x}吗？", "图中的{a}在{b}的{x}吗？"),
    },
    "vertical": {
        "en": ("Is the {a} {x} the {b}?", "Does the {a} stand {x} the {b}?", "Do you see the {a} {x} the {b}?"),
        "zh": ("{a}在{b}的{x}吗？", "图中的{a}在{b}的{x}吗？"),
    },
    "size": {
        "en": (
            "Is the {a} {x} than the {b}?",
            "Does the {a} look {x} than the {b}?",
            "Would you call the {a} {x} than the {b}?",
        ),
        "zh": ("{a}比{b}{x}吗？", "图中的{a}比{b}{x}吗？"),
    },
}

# Two pictures: {k} is 1 or 2.
PICTURE_QUESTIONS = {
    "count": {
        "en": (
            "How many {things} are in Picture {k}?",
            "Count the {things} in Picture {k}.",
            "In Picture {k}, how many {things} are there?",
        ),
        "zh": ("Picture {k}中有几个{things}？", "Picture {k}中有多少个{things}？"),
    },
    "more": {
        "en": (
            "Which picture has more objects?",
            "In which picture are there more objects?",
            "Which picture shows more objects?",
        ),
        "zh": ("哪张图片的物体更多？", "哪张图片中有更多物体？"),
    },
    "which": {
        "en": ("Which picture shows {thing}?", "Which picture has {thing}?", "In which picture is there {thing}?"),
        "zh": ("哪张图片中有{ref}？", "哪张图片有{ref}？"),
    },
    "color": {
        "en": ("What color is the {ref} in Picture {k}?", "In Picture {k}, what color is the {ref}?"),
        "zh": ("Picture {k}中的{ref}是什么颜色？",),
    },
    "read": {
        "en": ("What does the text in Picture {k} say?", "What is written in Picture {k}?"),
        "zh": ("Picture {k}中写着什么？",),
    },
}


def translate(word: str, language: str) -> str:
    """The word itself in English, its Chinese counterpart otherwise; what has none (digits, written text) stays."""
    return word if language == "en" else CHINESE.get(word, word)


def name(language: str, size: str | None, color: str | None, shape: str | None, plural: bool = False) -> str:
    """A noun phrase without an article: "large red circle", "red objects", "大的红色圆形"."""
    noun = shape or "object"
    if language == "zh":
        return (CHINESE[size] + "的" if size else "") + (CHINESE[color] if color else "") + CHINESE[noun]
    noun = noun if not plural else noun + ("es" if noun.endswith("s") else "s")
    return " ".join(word for word in (size, color, noun) if word)


def with_article(phrase: str) -> str:
    """An English phrase with "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def enumerate_phrases(phrases: list[str], language: str) -> str:
    """The phrases as one list: "x", "x and y", "x, y and z"; in Chinese with 、 and 和."""
    comma, conjunction = (", ", " and ") if language == "en" else ("、", "和")
    return conjunction.join(filter(None, (comma.join(phrases[:-1]), phrases[-1])))
