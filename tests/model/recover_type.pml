/*
 * The broker is killed at any step of the end of a type's life and the beginning of the next, and so is its successor, which closes
 * the words of no living life and removes their files; the third lives. A client of the old life stores or loads meanwhile, one of the
 * new life stores and loads.
 *
 * Shows: a word of an ended life is CLOSED at the end of a takeover and stays so until the next life, so nothing of an ended life keeps a
 * page; a living life's words and file are untouched, and what was stored in it is loaded; a load of an ended life ends in Closed,
 * or in the value, never in a damaged page; a store that returns in an ended life was there before its end.
 *
 * Bounds: one slot (spilled, dirty, or never stored at first), one store or load of the old client, two deaths; the living life may be
 * the old one or the new. Abstracted: cleaning is one step (store_clean.pml, type_life.pml); so is the sweep of orphans; a page and its
 * place in the file hold a value whole.
 */
#include "common.pml"

#define PAGES    2
#define OLD_LIFE 1
#define NEW_LIFE 3
#define OLD      1      /* the value that the slot holds at first */
#define LATE     2      /* what the old client stores */
#define NEW      3      /* what the new client stores */
#define GONE     4      /* what is read from a file that was emptied */
#define DEATHS   2
#define FILE(of_life) ((of_life) >> 1)
#define LIVES(of_life) ((of_life) & 1)

short word, side;
short life[PAGES];
byte  page_value[PAGES];
byte  type_life = OLD_LIFE;
byte  file_value[2];    /* one file per life */
bool  old_gone, new_gone;
byte  killed, ended;

bool  closed;           /* ghost: whoever ended the old life has gone through its words */

#define ORPHAN(page) (LIFE_STATE(life[page]) == PUBLISHED && !NAMES(word, page))

inline swing(state, dirty, page) {
    CAS(won, word, w, NEXT(w, state, dirty, page))
}

/* Leaves the outcome in over: the handle's life has ended. */
inline store(handle, stored) {
    atomic {
        if
        :: LIFE_STATE(life[0]) == FREE -> page = 0
        :: LIFE_STATE(life[1]) == FREE -> page = 1
        fi;
        life[page] = ADVANCE(life[page], GRANTED, 1)
    }
    page_value[page] = stored;
    do
    :: !won && !over ->
        w = word;
        over = (type_life != handle);
        if
        :: !over -> d_step { swing(CACHED, 1, page); assert(!won || handle == NEW_LIFE || !closed) }
        :: over
        fi
    :: won || over -> break
    od;
    life[page] = (won -> PUBLISH(life[page]) : ADVANCE(life[page], FREE, 0));
    won = false
}

/* Leaves the value in value, or over. A miss is value 0. */
inline load(handle) {
    do
    :: w = word;
        over = (type_life != handle);
        if
        :: over -> break
        :: !over && STATE(w) == EMPTY -> value = 0; break
        :: !over && STATE(w) == CACHED ->
            l = life[PAGE(w)];
            if
            :: word == w ->
                value = page_value[PAGE(w)];
                if
                :: SEQUENCE(life[PAGE(w)]) == SEQUENCE(l) -> break
                :: SEQUENCE(life[PAGE(w)]) != SEQUENCE(l)
                fi
            :: word != w
            fi
        :: !over && STATE(w) == SPILLED ->
            value = file_value[FILE(handle)];
            if
            :: word == w -> break
            :: word != w
            fi
        :: !over && STATE(w) == CLOSED -> over = true; break
        fi
    od
}

proctype old_client() {
    short w, l;
    byte page, value;
    bool won, over;
    if
    :: store(OLD_LIFE, LATE)
    :: load(OLD_LIFE); assert(over || value == OLD || value == 0)
    fi;
    assert(!over || type_life != OLD_LIFE);
    old_gone = true
}

proctype new_client() {
    short w, l;
    byte page, value;
    bool won, over;
end_never_begun:
    type_life == NEW_LIFE;
    store(NEW_LIFE, NEW);
    assert(!over);
    load(NEW_LIFE);
    assert(!over && value == NEW);
    new_gone = true
}

inline change_word(state) {
    do
    :: w = word;
        d_step { swing(state, 0, 0) }
        if
        :: won -> break
        :: !won
        fi
    od;
    won = false
}

inline end_life() {
    type_life++;                        /* @type.end */
    change_word(CLOSED);                /* @type.close */
    closed = true;
    file_value[FILE(OLD_LIFE)] = GONE
}

inline begin_life() {
    side = 0;
    change_word(EMPTY);                 /* @type.reset */
    type_life++                         /* @type.begin */
}

/* What belongs to a living life is left alone. The file last: who reads it finds the word closed then, and does not return it. */
inline take_over() {
#ifdef FAULT_RECOVER_FILE_FIRST
    file_value[FILE(OLD_LIFE)] = (type_life > OLD_LIFE -> GONE : file_value[FILE(OLD_LIFE)]);
#endif
    if
#ifdef FAULT_RECOVER_CLOSES_LIVING
    :: STATE(word) != CLOSED -> change_word(CLOSED)
#elif defined(FAULT_RECOVER_KEEPS_EMPTY)
    :: !LIVES(type_life) && STATE(word) != CLOSED && STATE(word) != EMPTY -> change_word(CLOSED)
#elif !defined(FAULT_RECOVER_KEEPS_WORDS)
    :: !LIVES(type_life) && STATE(word) != CLOSED -> change_word(CLOSED)        /* @recover.words */
#endif
    :: else
    fi;
    closed = (closed || type_life > OLD_LIFE);
#ifdef FAULT_RECOVER_EMPTIES_LIVING
    file_value[0] = GONE;
    file_value[1] = GONE
#else
    file_value[FILE(OLD_LIFE)] = (type_life > OLD_LIFE -> GONE : file_value[FILE(OLD_LIFE)])    /* removed */
#endif
}

active proctype broker() {
    short w;
    bool won, asked;
    if
    :: skip
    :: d_step { word = WORD(0, CACHED, 1, 0); life[0] = LIFE(0, PUBLISHED, 0); page_value[0] = OLD }
    :: d_step { word = WORD(0, SPILLED, 0, 0); file_value[FILE(OLD_LIFE)] = OLD; side = SIDE(0, OLD) }
    fi;
    atomic {
        run old_client();
        run new_client()
    }
    do
    :: {
        if
        :: ended -> take_over()
        :: !ended
        fi;
        /* Each is asked for, or not. */
        if
        :: type_life == OLD_LIFE -> end_life()
        :: true
        fi;
        if
        :: type_life == OLD_LIFE + 1 -> begin_life()
        :: true
        fi;
        do
        :: d_step { LIVES(type_life) && IS_DIRTY(word) -> w = word; file_value[FILE(type_life)] = page_value[PAGE(w)];
            side = SIDE(0, page_value[PAGE(w)]); swing(CACHED, 0, PAGE(w)); won = false }
        :: d_step { ORPHAN(0) -> life[0] = ADVANCE(life[0], FREE, 0) }
        :: d_step { ORPHAN(1) -> life[1] = ADVANCE(life[1], FREE, 0) }
        :: old_gone && (new_gone || type_life != NEW_LIFE) && !ORPHAN(0) && !ORPHAN(1) -> break
        od;
        break
       } unless { killed > ended };
       atomic { ended++; w = 0; won = false }
    od;
    assert(LIVES(type_life) || STATE(word) == CLOSED);
    assert(LIFE_STATE(life[0]) == FREE || NAMES(word, 0));
    assert(LIFE_STATE(life[1]) == FREE || NAMES(word, 1));
    assert(LIVES(type_life) || !IS_DIRTY(word));
    assert(STATE(word) != SPILLED || file_value[FILE(type_life)] == CRC(side))
}

active proctype killer() {
    do
    :: killed < DEATHS -> killed++
    :: break
    od
}
