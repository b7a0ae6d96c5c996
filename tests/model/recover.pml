/*
 * The broker is killed at any step of cleaning, eviction, promotion, a store by message or the burial of a client, and so is its
 * successor; the third lives. Clients store, clean and invalidate meanwhile, one may be killed, too.
 *
 * One slot, two nursery pages and an area page. Client 1 stores, and writes through or leaves it behind; client 2 stores another
 * value, or invalidates. The broker cleans what is dirty, promotes or evicts what is clean, frees what is nobody's.
 *
 * Shows: the slot's latest value is never lost; a clean word means that file and checksum are of its value; no page is owned twice;
 * whatever the dead were granted or had claimed is taken back, and no page stays granted, so that every orphan is swept and every dirty
 * page cleaned (otherwise the last broker waits for ever, an invalid end state). With -DPROGRESS and the formula below: also though a
 * client stops for ever, but for what that one holds.
 *
 * Bounds: one operation of each client, one store by message, one promotion and one eviction of each broker, two deaths of brokers,
 * one of a client; in scenes:
 *   SCENE_CLEAN    client 1, which may be killed, client 2, the broker's cleaning and its burial of client 1; one death of a broker
 *   SCENE_ASK      a clean page at first; client 2, and a store by message
 *   SCENE_PROMOTE  a clean page at first; client 2, promotions and evictions
 *   PROGRESS       the same, and client 2 may stop for ever; one death
 * Abstracted: a page holds a value whole, its place in the file two halves; the sweep of orphans is one step; who else wants the area
 * page (recover_range.pml).
 */
#include "common.pml"

#define PAGES   3
#define AREA    2
#define BROKER  3
#define NOTHING 0       /* the latest "value" of an invalidated slot */

#if defined(SCENE_CLEAN)
#define SCENE(clean, ask, promote, progress) clean
#elif defined(SCENE_ASK)
#define SCENE(clean, ask, promote, progress) ask
#elif defined(SCENE_PROMOTE)
#define SCENE(clean, ask, promote, progress) promote
#elif defined(PROGRESS)
#define SCENE(clean, ask, promote, progress) progress
#endif
#define DEATHS      SCENE(1, 2, 2, 1)                   /* of brokers */
#define CLIENT_DIES SCENE(true, false, false, false)    /* client 1 */
#define CLEANS      SCENE(false, true, true, true)      /* client 2, what it has stored */
#define ASKS        SCENE(0, 1, 0, 0)                   /* stores by message */
#define MOVES       SCENE(0, 0, 1, 1)                   /* promotions, and evictions, of each broker */
#define STOPS       SCENE(false, false, false, true)    /* client 2 */

short word, side;
short life[PAGES];
bool  keyed[PAGES];     /* key[page] is the slot (there is only one) */
byte  page_value[PAGES];
byte  file_first, file_second;

byte  killed_brokers, ended;
bool  killed, stopped;  /* client 1; client 2, and nobody notices */
bool  gone[3];          /* that client takes no more steps: dead or done */
bool  buried;           /* client 1, if it has died: its record is free */
byte  asked;            /* stores by message */

byte  latest;           /* ghost: what the last change of the slot stored */

#define DEAD(client) ((client) == 1 && killed && gone[1] && !buried)
#define ORPHAN(page) (LIFE_STATE(life[page]) == PUBLISHED && !NAMES(word, page))

/* Holds after every step that changes a word, a life, or the file. */
inline check() {
    assert(STATE(word) != CACHED || (IN_USE(life[PAGE(word)]) && keyed[PAGE(word)] && page_value[PAGE(word)] == latest));
    assert(!IS_DIRTY(word) || PAGE(word) != AREA);
    assert(!(IS_CLEAN(word) || STATE(word) == SPILLED) ||
           (file_first == latest && file_second == latest && CRC(side) == latest));
    assert(STATE(word) != EMPTY || latest == NOTHING)
}

inline swing(old, state, dirty, page) {
    CAS(won, word, old, NEXT(old, state, dirty, page));
    check()
}

#define ROOM (LIFE_STATE(life[0]) == FREE || LIFE_STATE(life[1]) == FREE)

/* To be used in an atomic step. */
inline grant(me) {
    if
    :: LIFE_STATE(life[0]) == FREE -> page = 0
    :: LIFE_STATE(life[1]) == FREE -> page = 1
    fi;
    life[page] = ADVANCE(life[page], GRANTED, me)
}

/* In the page that was granted. */
inline store(me, stored) {
    d_step { assert(OWNER(life[page]) == me); keyed[page] = true; page_value[page] = stored }
    do
    :: w = word;
        d_step {
            CAS(won, word, w, NEXT(w, CACHED, 1, page));
            latest = (won -> stored : latest);
            check()
        }
        if
        :: won -> break
        :: !won
        fi
    od;
    life[page] = PUBLISH(life[page]);
    d_step { won = false; w = 0; page = 0 }
}

inline invalidate_page() {
    do
    :: w = word;
        d_step {
            CAS(won, word, w, NEXT(w, EMPTY, 0, 0));
            latest = (won -> NOTHING : latest);
            check()
        }
        if
        :: won -> break
        :: !won
        fi
    od;
    won = false;
    w = 0
}

/* One attempt, as in store_clean.pml; each side word is its claimer's until it is given back, or its claimer dead. */
inline clean(me) {
    d_step { c = side; won = (WRITER_OF(c) == 0); mine = SIDE(WRITER(me, 0), CRC(c)); side = (won -> mine : side) }
    if
    :: won ->
        w = word;
        if
        :: IS_DIRTY(w) ->
            d_step { assert(side == mine); value = page_value[PAGE(w)]; file_first = value; check() }
            d_step { assert(side == mine); file_second = value; check() }
            d_step { CAS(won, side, mine, SIDE(WRITER_OF(mine), value)); assert(won); mine = side; check() }
            d_step { swing(w, CACHED, 0, PAGE(w)) }
        :: !IS_DIRTY(w)
        fi;
        d_step { CAS(won, side, mine, SIDE(0, CRC(mine))); assert(won); check() }
    :: !won
    fi;
    d_step { won = false; c = 0; mine = 0; w = 0; value = 0 }
}

proctype mortal() {
    short w, c, mine;
    byte page, value;
    bool won;
    {
        atomic { ROOM -> grant(1) }
        store(1, 1);
        if
        :: clean(1)
        :: true
        fi
    } unless { killed };
    atomic { gone[1] = true; page = 0; value = 0; w = 0; c = 0; mine = 0; won = false }
}

proctype client() {
    short w, c, mine;
    byte page, value;
    bool won;
    {
        if
        :: atomic { ROOM -> grant(2) } store(2, 2)
        :: CLEANS -> atomic { ROOM -> grant(2) } store(2, 2); clean(2)
        :: invalidate_page()
        fi;
        gone[2] = true
    } unless { stopped }
}

/* The broker's work. */

#define CLEAN_PAGE(page) (IS_CLEAN(word) && NAMES(word, page))

inline evict(page) {
    atomic { l = life[page]; w = word; won = false }
    if
    :: LIFE_STATE(l) == PUBLISHED && IS_CLEAN(w) && NAMES(w, page) ->
        d_step { swing(w, SPILLED, 0, 0) }
        if
        :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }
        :: !won
        fi
    :: LIFE_STATE(l) != PUBLISHED || !IS_CLEAN(w) || !NAMES(w, page)
    fi;
    d_step { l = 0; w = 0; won = false }
}

inline promote(page) {
    atomic { l = life[page]; w = word }
    if
    :: LIFE_STATE(l) == PUBLISHED && IS_CLEAN(w) && NAMES(w, page) ->
        life[AREA] = ADVANCE(life[AREA], GRANTED, 0);           /* @promote.grant */
        d_step { keyed[AREA] = true; page_value[AREA] = page_value[page] }      /* @promote.copy */
        life[AREA] = PUBLISH(life[AREA]);                       /* @promote.publish */
        d_step { swing(w, CACHED, 0, AREA) }                    /* @promote.swing */
        if
        :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }
        :: !won -> life[AREA] = ADVANCE(life[AREA], FREE, 0)    /* @promote.drop */
        fi
    :: LIFE_STATE(l) != PUBLISHED || !IS_CLEAN(w) || !NAMES(w, page)
    fi;
    d_step { l = 0; w = 0; won = false }
}

/* A granted nursery page of the dead: published if its word names it, else free. */
inline take_back(page, dead) {
    l = life[page];
    if
    :: LIFE_STATE(l) == GRANTED && (dead) ->
        named = keyed[page] && NAMES(word, page);
#ifdef FAULT_RECOVER_FREES_ALL_GRANTS
        named = false;
#endif
        d_step { CAS(won, life[page], l, (named -> PUBLISH(l) : ADVANCE(l, FREE, 0))); check() }        /* @recover.claims */
    :: !(LIFE_STATE(l) == GRANTED && (dead))
    fi;
    d_step { l = 0; won = false; named = false }
}

inline take_writer(dead) {
    c = side;
    if
    :: (dead) ->
#ifdef FAULT_RECOVER_DROPS_CRC
        d_step { CAS(won, side, c, 0); check() }
#else
        d_step { CAS(won, side, c, SIDE(0, CRC(c))); check() }
#endif
    :: !(dead)
    fi;
    d_step { c = 0; won = false }
}

/* The death pass, as in store_clean.pml. Cut off, it is done again: the record is free only after it. */
inline bury() {
    take_back(0, OWNER(l) == 1);
    take_back(1, OWNER(l) == 1);
    take_writer(CLIENT_OF(c) == 1);
    buried = true
}

#ifdef FAULT_RECOVER_KEEPS_GRANTS
#define OF_DEAD(l) false
#else
#define OF_DEAD(l) (OWNER(l) == BROKER || DEAD(OWNER(l)))
#endif
#if defined(FAULT_RECOVER_KEEPS_WRITER)
#define WRITER_DEAD(c) false
#elif defined(FAULT_RECOVER_TAKES_ANY_WRITER)
#define WRITER_DEAD(c) (WRITER_OF(c) != 0)
#else
#define WRITER_DEAD(c) (CLIENT_OF(c) == BROKER || DEAD(CLIENT_OF(c)))
#endif

inline take_over() {
    take_back(0, OF_DEAD(l));
    take_back(1, OF_DEAD(l));
    take_writer(WRITER_DEAD(c));
#ifndef FAULT_RECOVER_KEEPS_AREA_GRANT
    d_step { l = life[AREA]; life[AREA] = (LIFE_STATE(l) == GRANTED -> ADVANCE(l, FREE, 0) : l); l = 0 }        /* @recover.range */
#endif
}

#ifdef PROGRESS
#define IDLE false
#else
#define IDLE (gone[1] && gone[2] && !DEAD(1) && !IS_DIRTY(word) && !ORPHAN(0) && !ORPHAN(1) && !ORPHAN(AREA))
#endif

inline work() {
    do
    :: IS_DIRTY(word) && WRITER_OF(side) == 0 -> clean(BROKER)
    :: d_step { ORPHAN(0) -> life[0] = ADVANCE(life[0], FREE, 0); check() }
    :: d_step { ORPHAN(1) -> life[1] = ADVANCE(life[1], FREE, 0); check() }
    :: d_step { ORPHAN(AREA) -> life[AREA] = ADVANCE(life[AREA], FREE, 0); check() }
    :: atomic { asked < ASKS && ROOM -> asked++; grant(BROKER) } store(BROKER, 3)
    :: promotions < MOVES && CLEAN_PAGE(0) && LIFE_STATE(life[AREA]) == FREE -> promotions++; promote(0)
    :: promotions < MOVES && CLEAN_PAGE(1) && LIFE_STATE(life[AREA]) == FREE -> promotions++; promote(1)
    :: evictions < MOVES && CLEAN_PAGE(0) -> evictions++; evict(0)
    :: evictions < MOVES && CLEAN_PAGE(1) -> evictions++; evict(1)
    :: evictions < MOVES && CLEAN_PAGE(AREA) -> evictions++; evict(AREA)
    :: DEAD(1) -> bury()
    :: IDLE -> break
#ifdef PROGRESS
    :: else         /* looks again */
#endif
    od
}

active proctype broker() {
    short w, l, c, mine;
    byte page, value;
    byte promotions, evictions;
    bool won, named;
    atomic {
        if
        :: CLIENT_DIES -> run mortal()
        :: !CLIENT_DIES ->
            gone[1] = true;
            life[0] = LIFE(0, PUBLISHED, 0); keyed[0] = true; page_value[0] = 1; latest = 1;
            word = WORD(0, CACHED, 0, 0); side = SIDE(0, 1); file_first = 1; file_second = 1
        fi;
        run client()
    }
    do
    :: {
        if
        :: ended -> take_over()
        :: !ended
        fi;
end_swept:
        work();
        break
       } unless { killed_brokers > ended };
       atomic {
        ended++;
        promotions = 0; evictions = 0; named = false;
        page = 0; value = 0; w = 0; l = 0; c = 0; mine = 0; won = false
       }
    od;
    assert(WRITER_OF(side) == 0);
    assert(NAMES(word, 0) || LIFE_STATE(life[0]) == FREE);
    assert(NAMES(word, 1) || LIFE_STATE(life[1]) == FREE);
    assert(NAMES(word, AREA) || LIFE_STATE(life[AREA]) == FREE);
    check()
}

active proctype killer() {
    do
    :: killed_brokers < DEATHS -> killed_brokers++
    :: CLIENT_DIES && !killed -> killed = true
    :: STOPS && !stopped -> stopped = true
    :: break
    od
}

#ifdef PROGRESS
#define STOPPED(client) ((client) == 2 && stopped)
#define SWEPT(page) (LIFE_STATE(life[page]) == FREE || NAMES(word, page) || (LIFE_STATE(life[page]) == GRANTED && STOPPED(OWNER(life[page]))))
ltl swept   { <> [] (SWEPT(0) && SWEPT(1) && SWEPT(AREA) && (!IS_DIRTY(word) || STOPPED(CLIENT_OF(side)))) }
#endif
