"""What the tasks' prompts are made of: names, phrases, and the few fixed answers of small talk."""

from __future__ import annotations

SKILLS = (
    "I can copy text, sort numbers, letters or words, add and subtract, and fill in JSON templates. "
    "Try: Sort these numbers: 42, 7, 19"
)
HELLO = f"Hello! I am gLLM's built-in demo model. {SKILLS}"
WHO = f"I am gLLM's built-in demo model, a few megabytes that run anywhere. {SKILLS}"
UNKNOWN = f"I am only a small demo model and do not know that. {SKILLS}"
WELCOME = "You are welcome!"
GOODBYE = "Goodbye!"

SMALL_TALK = {
    HELLO: (
        "hello",
        "hi",
        "hey",
        "hello there",
        "hi there",
        "good morning",
        "good evening",
        "how are you",
        "test",
        "yo",
        "hello gllm",
        "hi, how are you",
        "nice to meet you",
        "good day",
        "hello, anybody there",
    ),
    WHO: (
        "who are you",
        "what are you",
        "what is your name",
        "what can you do",
        "what do you do",
        "help",
        "help me",
        "introduce yourself",
        "tell me about yourself",
        "what is this",
        "what can i ask you",
        "who made you",
        "are you a robot",
        "which model are you",
        "hi, who are you",
        "hello, what can you do",
        "hello, who are you",
        "what are you able to do",
        "what do you know",
        "what model is this",
        "how can you help me",
        "can you help me",
    ),
    WELCOME: ("thanks", "thank you", "thank you very much", "great, thanks", "thanks a lot"),
    GOODBYE: ("bye", "goodbye", "see you", "bye bye", "quit", "exit", "good night"),
}
"""Each answer and what it answers."""

BEYOND = (
    "what is the {word} of {word}",
    "what is {word}",
    "who is {word} {word}",
    "who was the first {word}",
    "where is {word}",
    "when was {word} {word} born",
    "why is the {word} {word}",
    "why do {word} {word}",
    "how do i {word} a {word}",
    "how does {word} work",
    "tell me a {word}",
    "tell me about {word}",
    "write a {word} about {word}",
    "write {word} in {word}",
    "explain {word} to me",
    "explain the {word} {word}",
    "can you {word} the {word}",
    "do you know {word}",
    "translate {word} to {word}",
    "summarize {word} {word} {word}",
    "i want to {word} a {word}",
    "{word} {word} {word}",
    "{word}",
    "{word} {word} {word} {word} {word} {word} {word}",
    "please {word} {word} {word} {word} {word} {word} {word} {word} {word} {word}",
    "give me a {word} {word} about {word} {word} {word} {word} {word} {word} {word} {word} {word}",
    "how {word} {word} {word} {word} {word} {word}",
    "what {word} {word} {word} {word} {word} {word}",
    "the {word} {word} {word} {word} {word} {word} {word}, {word} {word} {word} {word}",
    "count to {number}",
    "what is {number} times {number}",
    "what is {number} divided by {number}",
    "{number} * {number}",
    "{number}*{number}",
    "{number} / {number}",
    "{number}/{number}",
    "{number} + {number} + {number}",
    "what is the square root of {number}",
    "what is {number} * {number}",
)
"""Questions that the model knows nothing about, so that it says so."""

TOPICS = (
    *("weather", "capital", "France", "president", "poem", "story", "joke", "Python", "function", "history", "music"),
    *("rain", "love", "sky", "blue", "birds", "fly", "moon", "train", "recipe", "cake", "bake", "theory", "relativity"),
    *("king", "song", "German", "English", "essay", "program", "computer", "learn", "build", "house", "city", "car"),
    *("book", "world", "war", "river", "longest", "meaning", "life", "language", "model", "attention", "GPU", "code"),
    *("Einstein", "Mozart", "China", "Japan", "email", "letter", "today", "tomorrow", "news", "water", "boil", "egg"),
)

FILLERS = (
    *("the", "a", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they"),
    *("be", "at", "one", "have", "this", "from", "or", "had", "by", "but", "some", "what", "there", "we", "can", "out"),
    *("other", "were", "all", "your", "when", "up", "use", "word", "how", "said", "an", "each", "she", "which", "do"),
    *("their", "time", "if", "will", "way", "about", "many", "then", "them", "would", "write", "like", "so", "these"),
    *("her", "long", "make", "thing", "see", "him", "two", "has", "look", "more", "day", "could", "go", "come", "did"),
    *("my", "sound", "no", "most", "number", "who", "over", "know", "water", "than", "call", "first", "people", "may"),
    *("down", "side", "been", "now", "find", "any", "new", "work", "part", "take", "get", "place", "made", "live"),
    *(
        "where",
        "after",
        "back",
        "little",
        "only",
        "round",
        "man",
        "year",
        "came",
        "show",
        "every",
        "good",
        "me",
        "give",
    ),
    *(
        "our",
        "under",
        "name",
        "very",
        "through",
        "just",
        "form",
        "much",
        "great",
        "think",
        "help",
        "low",
        "line",
    ),
)

NAMES = (
    *("Nora", "Ben", "Mia", "Liam", "Zoe", "Omar", "Ines", "Pavel", "Yuki", "Chen", "Amara", "Tom", "Lena", "Hugo"),
    *("Ravi", "Sofia", "Ivan", "Aisha", "Karl", "Emma", "Noah", "Olga", "Diego", "Freya", "Anna", "Paul", "Maria"),
)
CITIES = (
    *("Oslo", "Lima", "Rome", "Cairo", "Delhi", "Kyoto", "Paris", "Quito", "Accra", "Bern", "Dublin", "Hanoi"),
    *("Berlin", "Madrid", "Tokyo", "London", "Nairobi", "Boston", "Sydney", "Porto", "Turin", "Lagos", "Perth"),
)
JOBS = ("baker", "nurse", "pilot", "teacher", "lawyer", "farmer", "singer", "doctor", "welder", "tailor", "judge")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "grey", "orange")
ITEMS = ("pens", "lamps", "chairs", "cups", "books", "shirts", "tables", "bags", "hats", "phones", "boxes", "plates")
ANIMALS = (
    "ant",
    "bear",
    "cat",
    "dog",
    "eagle",
    "fox",
    "goat",
    "horse",
    "lion",
    "mouse",
    "owl",
    "pig",
    "rabbit",
    "snake",
)
FRUITS = ("apple", "banana", "cherry", "date", "fig", "grape", "kiwi", "lemon", "mango", "orange", "pear", "plum")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name} is {age} and works as a {job} in {city}.",
    "The {job} {name} lives in {city} and is {age} years old.",
    "{name} from {city} is a {job}.",
    "My friend {name} moved to {city} at the age of {age}.",
    "{name} ordered {quantity} {color} {item} for {price} euros.",
    "We need {quantity} {item} in {color}, at {price} each.",
    "Please send {quantity} {color} {item} to {name} in {city}.",
    "{name} bought {quantity} {item} for {price} dollars.",
    "The meeting with {name} is on {day} at {time} in room {room}.",
    "Meet {name} in room {room} on {day} at {time}.",
    "On {day} at {time}, {name} gives a talk in {city}.",
    "Room {room} is booked for {name} until {time} on {day}.",
    "My name is {name} and I am {age} years old.",
    "My name is {name}.",
    "I am {name}, {age}, a {job} from {city}.",
    "I live in {city} and my favorite color is {color}.",
    "{name} is {age}.",
)

COPY = (
    "Copy: {text}",
    "Copy this text: {text}",
    "Copy this: {text}",
    "Repeat after me: {text}",
    "Repeat: {text}",
    "Please repeat this: {text}",
    "Say: {text}",
    "Echo: {text}",
    "Copy the following text exactly: {text}",
    "Copy {text}",
    "Repeat {text}",
    "Repeat after me {text}",
    "Say {text}",
)
ASCENDING = (
    "Sort: {items}",
    "Sort these {kind}: {items}",
    "Sort the {kind} {items}",
    "Sort {items}",
    "Sort this: {items}",
    "Sort this list: {items}",
    "Order these {kind}: {items}",
    "Please sort these {kind}: {items}",
    "Sort these {kind} in ascending order: {items}",
    "Put these {kind} in order: {items}",
)
DESCENDING = (
    "Sort these {kind} in descending order: {items}",
    "Sort in reverse: {items}",
    "Sort these {kind} in reverse order: {items}",
    "Sort these {kind} from last to first: {items}",
)
ARITHMETIC = (
    "What is {a} {sign} {b}?",
    "What is {a} {name} {b}?",
    "{a} {sign} {b}",
    "{a}{sign}{b}",
    "{a} {sign} {b} = ?",
    "{a}{sign}{b}=",
    "Calculate {a} {sign} {b}",
    "Compute {a} {sign} {b}.",
    "How much is {a} {name} {b}?",
    "{a} {name} {b}",
    "What's {a} {sign} {b}?",
    "Calculate {a}{sign}{b}.",
)
ADD = (*ARITHMETIC, "Add {a} and {b}", "Add {b} to {a}", "What is the sum of {a} and {b}?")
SUBTRACT = (*ARITHMETIC, "Subtract {b} from {a}", "Take {b} away from {a}")
JSON = (
    "Fill in {template} from: {sentence}",
    "Fill in this JSON template: {template}\n{sentence}",
    "Fill in the template {template} with this text: {sentence}",
    "{sentence}\nFill in {template}",
    "Extract {template} from this sentence: {sentence}",
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer with the result alone.",
    "You are gLLM's demo model.",
    "Be precise.",
)
SHARED_PREFIX = """You are gLLM's demo model. You answer with the result alone, without any explanation.
Four things, and how you answer:
Copying: the text comes back as it is.
Copy: Red Lorry 77 -> Red Lorry 77
Sorting: the same items, in order.
Sort these numbers: 31, 4, 15, 92 -> 4, 15, 31, 92
Sort these letters in reverse order: d, x, a -> x, d, a
Arithmetic: one whole number.
What is 250 + 75? -> 325
What is 12 - 20? -> -8
JSON: the template, filled from the sentence.
Fill in {"city": "", "age": 0} from: Ada is 36 and lives in Lund. -> {"city": "Lund", "age": 36}"""
"""A long system prompt that many cases share: what a prefix cache is for."""
