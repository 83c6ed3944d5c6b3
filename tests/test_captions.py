"""Cleaning captions: what is taken out, what stays, and what is dropped for which reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.data.captions import MAX_WORDS, clean_caption, clean_captions

CLEAN = {
    # people's captions lose their capital and final stop
    "A dog barks while rain falls on a tin roof.": "a dog barks while rain falls on a tin roof",
    "rain": "rain",
    "  Wind \n blows,  then stops ": "wind blows, then stops",
    "Café crowd chatter": "café crowd chatter",
    "A van drives by": "a van drives by",
    "Wasser": "wasser",
    "air_conditioner": "air conditioner",
    # and keep what only looks like boilerplate or mood
    "A dial tone is heard": "a dial tone",
    "A car stereo plays music": "a car stereo plays music",
    "Water flows, creating a bubbling noise": "water flows, creating a bubbling noise",
    "The engine gives a loud roar": "the engine gives a loud roar",
    "A metal file with a rasp": "a metal file with a rasp",
    "A man shouts 'I cannot hear you'": "a man shouts",
    # boilerplate
    "The audio contains rain on a roof.": "rain on a roof",
    "This audio clip features the sound of a train passing by.": "a train passing by",
    "This is a recording of waves crashing.": "waves crashing",
    "In this audio, we can hear birds chirping.": "birds chirping",
    "You can hear a bell ringing": "a bell ringing",
    "The sound of thunder": "thunder",
    "There is a siren wailing in the back ground.": "a siren wailing in the background",
    "Birds singing can be heard in the background.": "birds singing in the background",
    "A horse is heard galloping": "a horse galloping",
    "The recording begins with a loud bang, and footsteps can be heard": "a loud bang, and footsteps",
    "1. A cat hisses": "a cat hisses",
    "- **A cat** hisses": "a cat hisses",
    "A __cat__ hisses|purrs": "a cat hisses purrs",
    "“A cat hisses.”": "a cat hisses",
    "Caption 2: a cat hisses": "a cat hisses",
    # moods and opinions
    "Rain falls. The overall mood is calm. Thunder rolls.": "rain falls. thunder rolls",
    "An engine roars, creating a sense of urgency": "an engine roars",
    "Slow piano music plays, which evokes sadness.": "slow piano music plays",
    "A crowd cheers. It suggests a sports event. The audio is of high quality.": "a crowd cheers",
    # transcribed speech
    'A man says "please open the door" and a door creaks': "a man speaks and a door creaks",
    "A woman shouts 'I don't know' over traffic": "a woman shouts over traffic",
    "A man is saying that he will leave, then coughs": "a man is speaking, then coughs",
    'A child whispers: "come here, quick". A clock ticks.': "a child whispers. a clock ticks",
    'A machine beeps "go home right now" in an alarm': "a machine beeps in an alarm",
    'A robot goes "beep beep"': "a robot goes beep beep",
    'People talk. The speech content is "hello everybody in the room".': "people talk",
    # acoustic terms
    "a small dog is barking and a low-pitched rumble": "a small dog bark and an engine noise",
    "Dogs barking": "dog barks",
    "barking": "dog bark",
    "a sea lion barking": "a sea lion barking",
    "a thunder clap and foot steps": "thunder and footsteps",
    "Two gun-shots and an aeroplane": "two gunshots and an airplane",
    "a female voice and an adult male": "a woman and a man",
}


@pytest.mark.parametrize("text", CLEAN)
def test_cleaning(text: str) -> None:
    assert clean_caption(text) == (CLEAN[text], None)
    assert clean_caption(CLEAN[text]) == (CLEAN[text], None)


DROPPED = {
    "": "empty",
    " \n\t\u200b": "empty",
    '""': "empty",
    "雨の音": "not English",
    "Шум дождя": "not English",
    "rain 雨": "not English",
    "el sonido de la lluvia en una calle": "not English",
    "le bruit de la pluie avec du vent dans les arbres": "not English",
    "Regen und Wind auf der Straße": "not English",
    "I'm sorry, I can't help with that.": "a refusal",
    "As an AI language model, I hear nothing": "a refusal",
    "The overall mood is tense.": "describes no sound",
    "The audio contains": "describes no sound",
    "42!": "describes no sound",
    'The transcription is "hello there my friend".': "describes no sound",
    "rain " * 30: "repeats itself",
    "rain and wind. " * 1000: "too long",
    "a dog and " * 20: "too long",
}


@pytest.mark.parametrize("text", DROPPED)
def test_what_describes_no_sound_is_dropped(text: str) -> None:
    assert clean_caption(text) == (None, DROPPED[text])


def test_long_captions_keep_whole_sentences() -> None:
    """Whole sentences up to the limit; a first sentence above it is too long."""
    sentence = "a bell rings and a dog runs over some wet leaves"  # 11 words
    text = ". ".join(f"{sentence} {i}" for i in ("one", "two", "three", "four"))
    kept = clean_caption(text).text
    assert kept == ". ".join(f"{sentence} {i}" for i in ("one", "two", "three")) and len(kept.split()) <= MAX_WORDS
    assert clean_caption(text, max_words=12).text == f"{sentence} one"
    assert clean_caption(text, max_words=11).reason == "too long"


def test_candidates() -> None:
    """What is the same once cleaned is kept once, and reasons are given for what is dropped."""
    candidates = ["The audio contains rain.", "Rain", "", "雨", "A bell"]
    assert clean_captions(candidates) == (["rain", "a bell"], ["empty", "not English"])


PARTS = ["The audio contains", "a dog is barking", "can be heard", ",", ".", '"', "'", "says", "which creates", "mood"]
PARTS += [
    "the sound of",
    "there is",
    "in this clip,",
    "low-pitched rumble",
    "and",
    "overall",
    "it is",
    "1.",
    "rain",
    "I",
]
PARTS += ["footfalls", "is heard", "saying that", "talking", "we hear", "a recording of", "!", "-", "of", "adult male"]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=14).map(" ".join) | st.text("aZ .\"'-1é雨\t\u200b,“", max_size=20))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    cleaned, reason = clean_caption(text)
    assert (cleaned is None) != (reason is None)
    if cleaned is not None:
        assert clean_caption(cleaned) == (cleaned, None)
        assert cleaned == cleaned.strip() == " ".join(cleaned.split()).lower()
        assert 1 <= len(cleaned.split()) <= MAX_WORDS
