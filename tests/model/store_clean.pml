/*
 * Two clients change one slot; each may clean it, and so does the broker's writer; one client is killed, at any step or never, and
 * the broker runs its death pass meanwhile.
 *
 * Client 1 stores a value, written through. Client 2 does one of: a store written through, a store left behind, a store of
 * zeros or of another pattern, an invalidation.
 *
 * Shows: the slot's latest value is never lost, whoever dies where; a clean word means that the file and the checksum are of
 * its value; a store that was written through and returns is clean or superseded; no claim and no grant outlives the death pass;
 * no page is leaked, named by a word while free, or granted while named.
 *
 * Bounds: one slot, two nursery pages, two clients with one operation each, one death.
 * Abstracted: which page a ticket falls on (any free one), and the sweep of orphans (one step here; its steps are in
 * reclaim.pml).
 */
#include "common.pml"

#define PAGES  2
#define BROKER 3
#define NOTHING 3            /* the latest "value" of an invalidated slot; 0 is a page of zeros */
#define PATTERN(p) (4 + (p)) /* ... and of one that is filled with a pattern */

short word = WORD(0, EMPTY, 0, 0);
short side;
short life[PAGES];
bool  keyed[PAGES];     /* key[page] is the slot (there is only one) */
byte  page_first[PAGES], page_second[PAGES];
byte  file_first, file_second;

byte  killed;           /* the client whose next step is not taken */
bool  gone[3];          /* that client takes no more steps: dead or done */
bool  buried;           /* the death pass, if there was a death, is over */

byte  latest = NOTHING; /* ghost: what the last change of the slot stored */

#ifdef FAULT_PATTERN_NAMES_A_PAGE
#define LEADS_TO(page) (STATE(word) != EMPTY && PAGE(word) == (page))
#else
#define LEADS_TO(page) NAMES(word, page)
#endif
#define ORPHAN(page) (LIFE_STATE(life[page]) == PUBLISHED && !LEADS_TO(page))

/* Holds after every step that changes the word, the side word, the file or a life. */
inline check() {
    assert(STATE(word) != CACHED || (IN_USE(life[PAGE(word)]) && keyed[PAGE(word)]));
    assert(STATE(word) != CACHED || (page_first[PAGE(word)] == latest && page_second[PAGE(word)] == latest));
    assert(STATE(word) != EMPTY || latest == NOTHING);
    assert(STATE(word) != ZERO || latest == 0);
    assert(STATE(word) != FILLED || latest == PATTERN(PAGE(word)));
    assert(!IS_CLEAN(word) || (file_first == latest && file_second == latest));
    assert(!IS_CLEAN(word) || CRC(side) == CRC_OF(latest, latest))
}

/* Leaves in w the word that the store made. */
inline store(client, stored) {
    atomic {
        if
        :: LIFE_STATE(life[0]) == FREE -> page = 0
        :: LIFE_STATE(life[1]) == FREE -> page = 1
        fi;
        assert(!NAMES(word, page));
        life[page] = ADVANCE(life[page], GRANTED, client)/* @store.grant */
    }
    keyed[page] = true;         /* @store.fill */
    page_first[page] = stored;
    page_second[page] = stored;
#ifdef FAULT_PUBLISH_BEFORE_SWING
    life[page] = PUBLISH(life[page]);
#endif
    won = false;
    do
    :: !won ->
        w = word;
        d_step {
            CAS(won, word, w, NEXT(w, CACHED, 1, page));    /* @store.swing */
            w = NEXT(w, CACHED, 1, page);
            latest = (won -> stored : latest);
            check()
        }
    :: else -> break
    od;
#ifndef FAULT_PUBLISH_BEFORE_SWING
    life[page] = PUBLISH(life[page]);   /* @store.publish */
#endif
}

/* A change that needs no page: a pattern, zeros, or nothing at all. */
inline change(state, payload, stored) {
    won = false;
    do
    :: !won ->
        w = word;
        d_step {
            CAS(won, word, w, NEXT(w, state, 0, payload));    /* @store.filled */ /* @invalidate.swing */
            latest = (won -> stored : latest);
            check()
        }
    :: else -> break
    od
}

/* One attempt; a claim that is taken means: try later. */
inline clean(cleaner) {
    d_step {
        c = side;
#ifdef FAULT_CLEAN_WITHOUT_CLAIM
        won = true
#else
        won = (WRITER_OF(c) == 0);
#endif
        mine = SIDE(WRITER(cleaner, 0), CRC(c));
        side = (won -> mine : side);    /* @clean.claim */
        check()
    }
    if
    :: won ->
        dirty = word;                   /* @clean.read */
        if
        :: IS_DIRTY(dirty) ->
            d_step { first = page_first[PAGE(dirty)]; file_first = first; check() }     /* @clean.write */
            d_step { second = page_second[PAGE(dirty)]; file_second = second; check() }
#ifndef FAULT_CRC_AFTER_DIRTY_OFF
            d_step {
                CAS(won, side, mine, SIDE(WRITER_OF(mine), CRC_OF(first, second)));     /* @clean.crc */
                mine = (won -> side : mine);
                check()
            }
#endif
            d_step {
#ifdef FAULT_DIRTY_OFF_ANY_WORD
                dirty = (IS_DIRTY(word) -> word : dirty);
#endif
                CAS(won, word, dirty, NEXT(dirty, CACHED, 0, PAGE(dirty)));             /* @clean.dirty_off */
                check()
            }
#ifdef FAULT_CRC_AFTER_DIRTY_OFF
            d_step { side = SIDE(WRITER_OF(side), CRC_OF(first, second)); mine = side; check() }
#endif
        :: else
        fi;
        d_step { CAS(won, side, mine, SIDE(0, CRC(mine))); check() }                    /* @clean.release */
    :: else
    fi;
    d_step { won = false; c = 0; mine = 0; dirty = 0; first = 0; second = 0 }
}

/* Until the word that this store made is clean or superseded. */
inline write_through(cleaner) {
    do
    :: word != w -> break
    :: word == w && WRITER_OF(side) == 0 -> clean(cleaner)
    od
}

proctype worker(byte me) {
    short w, c, mine, dirty;
    byte page, first, second;
    bool won;
    {
        if
        :: store(me, me); write_through(me)
        :: me == 2 -> store(me, me)
        :: me == 2 -> change(ZERO, 0, 0)
        :: me == 2 -> change(FILLED, 1, PATTERN(1))
        :: me == 2 -> change(EMPTY, 0, NOTHING)
        fi
    } unless { killed == me };
    gone[me] = true
}

active proctype undertaker() {
    byte page;
    bool names;
    short s;
    if
    :: killed = 1
    :: killed = 2
    :: skip
    fi;
    if
    :: killed != 0 ->
        gone[killed];
        do
        :: page < PAGES ->
            if
            :: LIFE_STATE(life[page]) == GRANTED && OWNER(life[page]) == killed ->
                names = keyed[page] && NAMES(word, page);
#ifdef FAULT_DEATH_FREES_ALL_GRANTS
                names = false;
#endif
                d_step {    /* @death.grants */
                    life[page] = (names -> PUBLISH(life[page]) : ADVANCE(life[page], FREE, 0));
                    check()
                }
            :: else
            fi;
            page++
        :: else -> break
        od;
#ifndef FAULT_DEATH_KEEPS_CLAIM
        s = side;
#ifdef FAULT_DEATH_TAKES_ANY_CLAIM
        d_step { side = SIDE(0, CRC(side)); check() }
#else
        d_step { CAS(names, side, s, SIDE((CLIENT_OF(s) == killed -> 0 : WRITER_OF(s)), CRC(s))); check() } /* @death.writer */
#endif
#endif
    :: else
    fi;
    buried = true
}

/* The broker's writer, and at the end the judge: it stops where nothing is left to do, or hangs on what was left behind. */
active proctype broker() {
    short w, c, mine, dirty;
    byte page, first, second;
    bool won;
    run worker(1);
    run worker(2);
    do
    :: IS_DIRTY(word) && WRITER_OF(side) == 0 -> clean(BROKER)
    :: d_step { ORPHAN(0) -> life[0] = ADVANCE(life[0], FREE, 0); check() }
    :: d_step { ORPHAN(1) -> life[1] = ADVANCE(life[1], FREE, 0); check() }
    :: gone[1] && gone[2] && buried && !IS_DIRTY(word) && !ORPHAN(0) && !ORPHAN(1) -> break
    od;
    assert(WRITER_OF(side) == 0);
    assert(NAMES(word, 0) || LIFE_STATE(life[0]) == FREE);
    assert(NAMES(word, 1) || LIFE_STATE(life[1]) == FREE);
    check()
}
