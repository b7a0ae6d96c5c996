/*
 * A disk that fails for a while, or for good: pages that cannot be written stay where they are, readable, and are cleaned when it works
 * again; what a store tells its caller.
 *
 * Two slots, two nursery pages, each the only place of its slot's value at first or the second one free. Client 1 stores to slot 0 and has
 * it written through; client 2 cleans slot 0 and may stop for ever at any step; client 3 invalidates slot 1, or loads slot 0. The
 * disk fails from some moment on, in the middle of a write, too, and may work again from some later moment on.
 *
 * Shows: no value is lost or read damaged; a store that finds no page fails before it has changed anything, and does find one that
 * an invalidation has left; one that was written through returns with its value clean or superseded, and otherwise tells: stored, but not
 * written; it waits for no client that is stopped; once the disk works for good, every dirty page is cleaned (formula `cleaned`, weak
 * fairness; but for one that a stopped client holds).
 *
 * Bounds: one store, one cleaning, one invalidation or load; one failure of the disk, and its end; in scenes:
 *   SCENE_FULL   both pages dirty at first; the store, and client 3 invalidates slot 1
 *   SCENE_LOAD   a page is free at first; the store, and client 3 loads slot 0
 *   SCENE_STOP   a page is free at first; the store, and client 2
 *   PROGRESS     both pages dirty at first; the store, and client 2
 * Abstracted: a page holds a value whole, its place in the file two halves; nobody loads slot 1. Only the storer's own
 * cleaning is step by step, that of reclaim is one, and client 2 does no more than to claim and to give back (store_clean.pml).
 */
#include "common.pml"

#define PAGES   2
#define SLOTS   2
#define NOTHING 0       /* the latest "value" of an invalidated slot */

#if defined(SCENE_FULL)
#define SCENE(full, load, stop, progress) full
#elif defined(SCENE_LOAD)
#define SCENE(full, load, stop, progress) load
#elif defined(SCENE_STOP)
#define SCENE(full, load, stop, progress) stop
#elif defined(PROGRESS)
#define SCENE(full, load, stop, progress) progress
#endif
#define MANY        SCENE(true, false, false, true)     /* both pages are dirty at first */
#define THROUGH     SCENE(true, false, true, true)      /* what is stored is written through */
#define CLEANS      SCENE(false, false, true, true)     /* client 2 */
#define INVALIDATES SCENE(true, false, false, false)    /* client 3 */
#define LOADS       SCENE(false, true, false, false)    /* client 3 */

/* What a store tells. */
#define STORED  1
#define UNWRITTEN 2     /* stored, visible; not in the file: SpillError */
#define FULL    3       /* nothing has changed: NurseryFull */
#define BUSY    4       /* stored, visible; somebody else has been writing that place all the time */

short word[SLOTS], side[SLOTS];
short life[PAGES];
bool  key[PAGES];
byte  page_value[PAGES];
byte  file_first[SLOTS], file_second[SLOTS];

bool  works = true;     /* the disk */
bool  settled;          /* it will not change any more */
bool  gone[4];          /* that client takes no more steps: done, or stopped */
bool  stopped;          /* client 2 */

byte  latest[SLOTS];    /* ghost: what the last change of the slot stored */

#define ORPHAN(page) (LIFE_STATE(life[page]) == PUBLISHED && !NAMES(word[key[page]], page))
#define HELD_BY_STOPPED(n) (stopped && CLIENT_OF(side[n]) == 2)

inline check_slot(n) {
    assert(STATE(word[n]) != CACHED || (IN_USE(life[PAGE(word[n])]) && key[PAGE(word[n])] == n));
    assert(STATE(word[n]) != CACHED || page_value[PAGE(word[n])] == latest[n]);
    assert(!(IS_CLEAN(word[n]) || STATE(word[n]) == SPILLED) ||
           (file_first[n] == latest[n] && file_second[n] == latest[n] && CRC(side[n]) == latest[n]));
    assert(STATE(word[n]) != EMPTY || latest[n] == NOTHING)
}

/* Holds after every step that changes a word, a life or a file. */
inline check() {
    check_slot(0);
    check_slot(1)
}

/* One attempt to clean slot n; leaves its outcome in told. */
inline clean(me, n) {
    d_step {
        c = side[n];
        won = (WRITER_OF(c) == 0);
        mine = SIDE(WRITER(me, 0), CRC(c));
        side[n] = (won -> mine : c);
        told = (won -> STORED : BUSY)
    }
    if
    :: won ->
        w = word[n];
        if
        :: IS_DIRTY(w) ->
            d_step { value = page_value[PAGE(w)]; file_first[n] = (works -> value : file_first[n]); told = (works -> STORED : UNWRITTEN); check() }
            if
            :: told == STORED ->
                d_step { file_second[n] = (works -> value : file_second[n]); told = (works -> STORED : UNWRITTEN); check() }
            :: told == UNWRITTEN
            fi;
#ifdef FAULT_ERROR_TAKES_DIRTY_OFF
            if
            :: true ->
#else
            if
            :: told == STORED ->
#endif
                d_step { side[n] = SIDE(WRITER_OF(mine), value); mine = side[n]; check() }
                d_step { CAS(won, word[n], w, NEXT(w, CACHED, 0, PAGE(w))); check() }
            :: told == UNWRITTEN        /* given back, DIRTY as before */
            fi
        :: !IS_DIRTY(w)
        fi;
#ifdef FAULT_ERROR_KEEPS_CLAIM
        if
        :: told != UNWRITTEN -> side[n] = SIDE(0, CRC(mine))
        :: told == UNWRITTEN
        fi
#else
        side[n] = SIDE(0, CRC(mine))    /* @clean.release */
#endif
    :: !won
    fi;
    d_step { won = false; c = 0; mine = 0; w = 0; value = 0 }
}

/* The same in one step: of two that clean at a time, store_clean.pml knows more. The disk may fail in the middle. */
inline clean_at_once(n) {
    d_step {
        w = word[n];
        won = (WRITER_OF(side[n]) == 0 && IS_DIRTY(w));
        value = page_value[PAGE(w)];
        file_first[n] = (won -> value : file_first[n]);
        file_second[n] = (won && works -> value : file_second[n]);
        told = (WRITER_OF(side[n]) != 0 -> BUSY : (works -> STORED : UNWRITTEN));
#ifdef FAULT_ERROR_TAKES_DIRTY_OFF
        side[n] = (won -> SIDE(0, value) : side[n]);
        word[n] = (won -> NEXT(w, CACHED, 0, PAGE(w)) : w);
#else
        side[n] = (won && works -> SIDE(0, value) : side[n]);
        word[n] = (won && works -> NEXT(w, CACHED, 0, PAGE(w)) : w);
#endif
        won = false; value = 0; w = 0;
        check()
    }
}

/* What a page holds, as of one moment (load.pml); then it is cleaned, evicted or freed. Leaves in told whether it could not be cleaned. */
inline reclaim(page) {
    d_step { l = life[page]; n = key[page]; w = word[n]; told = STORED }
    if
    :: LIFE_STATE(l) == PUBLISHED && NAMES(w, page) && IS_DIRTY(w) ->
        clean_at_once(n)        /* given back, DIRTY as before */
#ifdef FAULT_EVICT_UNWRITTEN
        ;
        if
        :: told == UNWRITTEN -> d_step { w = word[n]; CAS(won, word[n], w, NEXT(w, SPILLED, 0, 0)); check() }
        :: told != UNWRITTEN
        fi
#endif
    :: LIFE_STATE(l) == PUBLISHED && NAMES(w, page) && !IS_DIRTY(w) ->
        d_step { CAS(won, word[n], w, NEXT(w, SPILLED, 0, 0)); check() }
        if
        :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }
        :: !won
        fi
    :: LIFE_STATE(l) == PUBLISHED && !NAMES(w, page) -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }
    :: LIFE_STATE(l) != PUBLISHED
    fi;
    d_step { l = 0; w = 0; n = 0; won = false }
}

#define TRIES 1         /* until a store's deadline */
#define ROOM (LIFE_STATE(life[0]) == FREE || LIFE_STATE(life[1]) == FREE)

/* Client 1: a store that is written through. */
proctype storer() {
    short w, l, c, mine, stored;
    byte page, value, told, n, tries;
    bool won;
#ifdef FAULT_WORD_BEFORE_PAGE
    d_step { word[0] = NEXT(word[0], EMPTY, 0, 0); latest[0] = NOTHING }
#endif
    stored = word[0];
    do
    :: atomic {
        ROOM ->
        if
        :: LIFE_STATE(life[0]) == FREE -> page = 0
        :: LIFE_STATE(life[1]) == FREE -> page = 1
        fi;
        life[page] = ADVANCE(life[page], GRANTED, 1)
       }
       told = STORED;
       break
#ifdef FAULT_FULL_WAITS
    :: !ROOM ->
#else
    :: !ROOM && tries == TRIES -> told = FULL; break    /* NurseryFull */
    :: !ROOM && tries < TRIES ->
        tries++;
#endif
        /* Direct reclaim: whatever its ticket falls on. */
        if
        :: reclaim(0)
        :: reclaim(1)
        fi
    od;
    if
    :: told == FULL -> assert(word[0] == stored || VERSION(word[0]) > VERSION(stored)); assert(latest[0] == 1)
    :: told != FULL ->
        key[page] = 0;
        page_value[page] = 2;
        won = false;
        do
        :: !won ->
            w = word[0];
            d_step {
                CAS(won, word[0], w, NEXT(w, CACHED, 1, page));
                stored = word[0];
                latest[0] = (won -> 2 : latest[0]);
                check()
            }
        :: won -> break
        od;
        life[page] = PUBLISH(life[page]);
        atomic { won = false; told = STORED }
        do
        :: word[0] != stored || !THROUGH -> break
        :: THROUGH && word[0] == stored && WRITER_OF(side[0]) == 0 ->
            clean(1, 0);
            if
            :: told == UNWRITTEN -> break       /* SpillError */
            :: told != UNWRITTEN
            fi
#ifndef FAULT_WAITS_FOR_WRITER
        :: THROUGH && word[0] == stored && WRITER_OF(side[0]) != 0 -> told = BUSY; break
#endif
        od;
#ifdef FAULT_TELLS_NOTHING
        told = STORED;
#endif
        assert(told != STORED || word[0] != stored || !THROUGH);
        assert(latest[0] == 2)
    fi;
    gone[1] = true
}

/* Client 2 has the claim of slot 0's place for a while, or for ever. */
proctype cleaner() {
    short c;
    d_step { WRITER_OF(side[0]) == 0 -> c = side[0]; side[0] = SIDE(WRITER(2, 0), CRC(c)) }
    if
    :: side[0] = SIDE(0, CRC(c))
    :: stopped = true
    fi;
    atomic { c = 0; gone[2] = true }
}

/* Client 3. */
proctype other() {
    short w, l;
    byte first, second, before;
    bool won;
    if
    :: INVALIDATES ->
       do
        :: !won ->
            w = word[1];
            d_step { CAS(won, word[1], w, NEXT(w, EMPTY, 0, 0)); latest[1] = (won -> NOTHING : latest[1]); check() }
        :: won -> break
       od
    :: LOADS ->
       before = latest[0];
       do
        :: w = word[0];
            if
            :: STATE(w) == CACHED ->
                l = life[PAGE(w)];
                if
                :: word[0] == w ->
                    first = page_value[PAGE(w)];
                    second = first;
                    if
                    :: SEQUENCE(life[PAGE(w)]) == SEQUENCE(l) -> break
                    :: SEQUENCE(life[PAGE(w)]) != SEQUENCE(l)
                    fi
                :: word[0] != w
                fi
            :: STATE(w) == SPILLED ->
                first = file_first[0];
                second = file_second[0];
                if
                :: word[0] == w -> break
                :: word[0] != w
                fi
            fi
       od;
       assert(first == second && (first == before || first == latest[0]))
    fi;
    gone[3] = true
}

proctype disk() {
    works = false;
    if
    :: works = true
    :: true
    fi;
    settled = true
}

#ifdef PROGRESS
#define IDLE false
#else
#define DONE(n) (!IS_DIRTY(word[n]) || !works || HELD_BY_STOPPED(n))
#define IDLE (gone[1] && gone[2] && gone[3] && settled && DONE(0) && DONE(1) && !ORPHAN(0) && !ORPHAN(1))
#endif

/* The broker's reclaim thread: page after page, again and again. */
active proctype sweeper() {
    short w, l;
    byte value, told, n, at;
    bool won;
#ifdef FAULT_NEVER_AGAIN
    bool failed[PAGES];
#endif
    d_step {
        life[0] = LIFE(0, PUBLISHED, 0); page_value[0] = 1; latest[0] = 1; word[0] = WORD(0, CACHED, 1, 0);
        key[1] = 1
    }
    if
    :: MANY -> d_step { life[1] = LIFE(0, PUBLISHED, 0); page_value[1] = 1; latest[1] = 1; word[1] = WORD(0, CACHED, 1, 1) }
    :: !MANY
    fi;
    atomic {
        run storer();
        if
        :: CLEANS -> run cleaner()
        :: !CLEANS -> gone[2] = true
        fi;
        if
        :: INVALIDATES || LOADS -> run other()
        :: !INVALIDATES && !LOADS -> gone[3] = true
        fi;
        run disk()
    }
    do
    :: !IDLE ->
#ifdef FAULT_NEVER_AGAIN
        if
        :: !failed[at] -> reclaim(at); failed[at] = (told == UNWRITTEN)
        :: failed[at]
        fi;
#else
        reclaim(at);
#endif
        at = 1 - at
    :: IDLE -> break
    od;
    assert(LIFE_STATE(life[0]) == FREE || NAMES(word[0], 0) || NAMES(word[1], 0));
    assert(LIFE_STATE(life[1]) == FREE || NAMES(word[0], 1) || NAMES(word[1], 1));
    assert(WRITER_OF(side[0]) == 0 || HELD_BY_STOPPED(0));
    check()
}

#ifdef PROGRESS
ltl cleaned { <> gone[1] && <> [] ((!IS_DIRTY(word[0]) || HELD_BY_STOPPED(0) || !works) && (!IS_DIRTY(word[1]) || !works)) }
#endif
