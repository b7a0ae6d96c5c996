/*
 * The end and the new life of a type, with a client of the old life in the middle of a store, a clean or a load.
 *
 * The old client does one operation with a handle of life 1. Meanwhile the broker ends that life and begins the next
 * one (life 3). A new client then stores, has its store written through, and loads it. Both are threads of one worker: they
 * have the same client number, so that only the tag tells their claims apart. The broker's writer cleans whatever is dirty,
 * in either life.
 *
 * Shows: what the old client does when it goes on changes no word, file or claim of the new life; an operation that began after
 * the end of its life ends in Closed, and none returns a value of another life; the words stay CLOSED until the new life; a
 * claim is given back by who made it; no page is leaked.
 *
 * Bounds: one slot (never stored, dirty, or spilled at first), two nursery pages, three cleaners, two lives.
 * Abstracted: a page and its place in the file hold a value whole; the sweep of orphans is one step.
 */
#include "common.pml"

#define PAGES   2
#define WORKER  1       /* the client number of both clients */
#define BROKER  2
#define OLD_LIFE 1
#define NEW_LIFE 3
#define OLD     1       /* the value that the slot holds at first */
#define LATE    2       /* what the old client stores */
#define NEW     3       /* what the new client stores */

#ifdef FAULT_ONE_FILE_FOR_ALL_LIVES
#define FILE(of_life) 0
#else
#define FILE(of_life) ((of_life) >> 1)
#endif

short word, side;
short life[PAGES];
byte  page_value[PAGES];
byte  type_life = OLD_LIFE;
byte  file_value[2];    /* one file per life */
bool  old_gone, new_gone;

bool  closed;           /* ghost: the old life's words are CLOSED, or have been reset since */
byte  holder;           /* ghost: the process that holds the claim */
byte  latest;           /* ghost: the value that the slot holds in the life that goes on */

#define ORPHAN(page) (LIFE_STATE(life[page]) == PUBLISHED && !NAMES(word, page))

/* Holds after every step that changes the word, the side word or the file. */
inline check() {
    assert(STATE(word) != CACHED || (IN_USE(life[PAGE(word)]) && page_value[PAGE(word)] == latest));
    assert(!(IS_CLEAN(word) || STATE(word) == SPILLED) ||
           (file_value[FILE((closed -> NEW_LIFE : OLD_LIFE))] == latest && CRC(side) == latest));
    assert(!closed || type_life == NEW_LIFE || STATE(word) == CLOSED || STATE(word) == EMPTY)
}

/* Leaves the outcome in ended: the handle's life is over. */
inline store(handle, stored) {
    atomic {
        if
        :: LIFE_STATE(life[0]) == FREE -> page = 0
        :: LIFE_STATE(life[1]) == FREE -> page = 1
        fi;
        life[page] = ADVANCE(life[page], GRANTED, WORKER)   /* @store.grant */
    }
    page_value[page] = stored;      /* @store.fill */
    do
    :: !won && !ended ->
#ifdef FAULT_LIFE_BEFORE_WORD
        ended = (type_life != handle);
        w = word;
#else
        w = word;
#ifndef FAULT_STORE_WITHOUT_LIFE
        ended = (type_life != handle);
#endif
#endif
        if
        :: !ended ->
            d_step {
                CAS(won, word, w, NEXT(w, CACHED, 1, page));    /* @store.swing */
                assert(!won || handle == NEW_LIFE || !closed);
                latest = (won -> stored : latest);
                check()
            }
        :: else
        fi
    :: else -> break
    od;
    if
    :: won -> life[page] = PUBLISH(life[page])              /* @store.publish */
#ifdef FAULT_STORE_NEVER_ABANDONS
    :: else
#else
    :: else -> life[page] = ADVANCE(life[page], FREE, 0)    /* @store.abandon */
#endif
    fi
}

/*
 * One attempt. handle is the only life that this cleaner may clean; 0: any.
 * The life is read before the claim is made and again after the word was read: type.reset takes off the claims of earlier lives, so
 * a claim is only known to be held if no life has ended since before it was made.
 */
inline clean(client, tag, handle) {
#ifndef FAULT_LIFE_AFTER_CLAIM
    t = type_life;                              /* @clean.life */
#endif
    c = side;
    mine = SIDE(WRITER(client, tag), CRC(c));
    d_step {
        won = (WRITER_OF(c) == 0 && side == c);
        side = (won -> mine : side);        /* @clean.claim */
        holder = (won -> _pid : holder);
        check()
    }
    if
    :: won ->
#ifdef FAULT_LIFE_AFTER_CLAIM
        t = type_life;
#endif
        w = word;                           /* @clean.read */
        ended = (type_life != t || !(t & 1) || (handle != 0 && handle != t));
#ifdef FAULT_CLEAN_WITHOUT_LIFE_AGAIN
        ended = !(t & 1);
#endif
        if
        :: !ended && IS_DIRTY(w) ->
            d_step {                        /* @clean.write */
                first = page_value[PAGE(w)];
                assert(t != type_life || holder == _pid);
                file_value[FILE(t)] = first;
                check()
            }
            d_step {
                CAS(won, side, mine, SIDE(WRITER_OF(mine), first));     /* @clean.crc */
                mine = (won -> side : mine);
                assert(!won || holder == _pid);
                check()
            }
            d_step {
                CAS(won, word, w, NEXT(w, CACHED, 0, PAGE(w)));         /* @clean.dirty_off */
                check()
            }
        :: else
        fi;
        d_step {
#ifdef FAULT_RELEASE_WITHOUT_TAG
            mine = (CLIENT_OF(side) == client -> side : mine);
#endif
            CAS(won, side, mine, SIDE(0, CRC(mine)));                   /* @clean.release */
            assert(!won || holder == _pid);
            check()
        }
    :: else
    fi;
    d_step { won = false; ended = false; c = 0; mine = 0; w = 0; t = 0; first = 0 }
}

/* Leaves the value in first, or ended. A miss is value 0. */
inline load(handle) {
    do
    :: w = word;                            /* @load.word */
#ifndef FAULT_LOAD_WITHOUT_LIFE
        ended = (type_life != handle);      /* @load.type */
#endif
        if
        :: ended -> break
        :: !ended && STATE(w) == EMPTY -> first = 0; break
        :: !ended && STATE(w) == CACHED ->
            l = life[PAGE(w)];              /* @load.life */
            if
            :: word == w ->                 /* @load.again */
                first = page_value[PAGE(w)];                        /* @load.copy */
                if
                :: SEQUENCE(life[PAGE(w)]) == SEQUENCE(l) -> break  /* @load.recheck */
                :: SEQUENCE(life[PAGE(w)]) != SEQUENCE(l)
                fi
            :: word != w
            fi
        :: !ended && STATE(w) == SPILLED ->
            first = file_value[FILE(handle)];                       /* @load.file */
            if
            :: word == w -> break           /* @load.file_again */
            :: word != w
            fi
        :: !ended && STATE(w) == CLOSED -> ended = true; break
        fi
    od
}

proctype old_client() {
    short w, l, c, mine;
    byte page, t, first;
    bool won, ended, late;
    late = (type_life != OLD_LIFE);
    if
    :: store(OLD_LIFE, LATE); assert(ended || !late)
    :: clean(WORKER, 0, OLD_LIFE)
    :: load(OLD_LIFE); assert(ended || (!late && first != NEW))
    fi;
    assert(!ended || type_life != OLD_LIFE);
    old_gone = true
}

proctype new_client() {
    short w, l, c, mine;
    byte page, t, first;
    bool won, ended;
    type_life == NEW_LIFE;
    store(NEW_LIFE, NEW);
    assert(!ended);
    won = false;
    do
    :: IS_DIRTY(word) && WRITER_OF(side) == 0 -> clean(WORKER, 1, NEW_LIFE)
    :: !IS_DIRTY(word) -> break
    od;
    load(NEW_LIFE);
    assert(!ended && first == NEW);
    new_gone = true
}

/* The broker's control thread: the end of a life and the beginning of the next. */
proctype lives() {
#ifdef FAULT_CLOSE_BEFORE_END
    d_step { word = NEXT(word, CLOSED, 0, 0); closed = true; check() }
    type_life++;
#else
    type_life++;        /* @type.end */
    d_step { word = NEXT(word, CLOSED, 0, 0); closed = true; check() }      /* @type.close */
#endif
#ifdef FAULT_BEGIN_BEFORE_RESET
    type_life++;
#endif
    d_step { side = 0; holder = 0; latest = 0 }
    d_step {
#ifdef FAULT_VERSION_STARTS_ANEW
        word = WORD(0, EMPTY, 0, 0);
#else
        word = NEXT(word, EMPTY, 0, 0);     /* @type.reset */
#endif
        check()
    }
#ifndef FAULT_BEGIN_BEFORE_RESET
    type_life++;        /* @type.begin */
#endif
}

/* The broker's writer and sweep, and at the end the judge. */
active proctype broker() {
    short w, c, mine;
    byte t, first;
    bool won, ended;
    if
    :: skip
    :: d_step {
        word = WORD(0, CACHED, 1, 0); life[0] = LIFE(0, PUBLISHED, 0); page_value[0] = OLD; latest = OLD
       }
    :: d_step { word = WORD(0, SPILLED, 0, 0); file_value[FILE(OLD_LIFE)] = OLD; side = SIDE(0, OLD); latest = OLD }
    fi;
    atomic {
        run old_client();
        run new_client();
        run lives()
    }
    do
    :: IS_DIRTY(word) && WRITER_OF(side) == 0 -> clean(BROKER, 0, 0)
    :: d_step { ORPHAN(0) -> life[0] = ADVANCE(life[0], FREE, 0); check() }
    :: d_step { ORPHAN(1) -> life[1] = ADVANCE(life[1], FREE, 0); check() }
    :: old_gone && new_gone && !ORPHAN(0) && !ORPHAN(1) -> break
    od;
    assert(WRITER_OF(side) == 0);
    assert(LIFE_STATE(life[0]) == FREE || NAMES(word, 0));
    assert(LIFE_STATE(life[1]) == FREE || NAMES(word, 1));
    assert(IS_CLEAN(word) && latest == NEW);
    check()
}
