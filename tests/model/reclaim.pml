/*
 * Reclaim of nursery pages by a client that found none free (direct reclaim) against the same by the broker's sweep, with stores
 * in flight and a page being invalidated, and the death of a client at any step.
 *
 * The nursery is full at first: page 0 holds slot 0, clean; page 1 holds slot 1, dirty. Client 1 stores to slot 0 and may be
 * killed. Client 2 stores to slot 0 or to slot 1, or invalidates slot 0. Who finds no page free makes one.
 *
 * Shows: no page is owned twice (granted while named, written by who does not hold it), none is lost (at the end, after a sweep,
 * each page is FREE or named), and no value is lost by eviction, by overwriting or by death.
 *
 * Bounds: two slots, two pages, two clients with one operation each, a sweep without bound, one death.
 * Abstracted: a page and its place in the file hold a value whole (halves are in load.pml and store_clean.pml); cleaning is one
 * step (its steps are in store_clean.pml); a ticket falls on any page, and the sweep's hand too, which allows more than the code.
 */
#include "common.pml"

#define PAGES  2
#define SLOTS  2
#define NOTHING 0   /* the latest "value" of an invalidated slot */

short word[SLOTS];
short life[PAGES];
byte  key[PAGES];
byte  page_value[PAGES], file_value[SLOTS];

bool  killed;
bool  gone[3];
bool  buried;

byte  latest[SLOTS];    /* ghost: what the last change of the slot stored */

inline check_slot(n) {
    assert(STATE(word[n]) != CACHED || (IN_USE(life[PAGE(word[n])]) && key[PAGE(word[n])] == n));
    assert(STATE(word[n]) != CACHED || page_value[PAGE(word[n])] == latest[n]);
    assert(!(IS_CLEAN(word[n]) || STATE(word[n]) == SPILLED) || file_value[n] == latest[n]);
    assert(STATE(word[n]) != EMPTY || latest[n] == NOTHING)
}

/* Holds after every step that changes a word or a life. */
inline check() {
    check_slot(0);
    check_slot(1)
}

inline reclaim(page) {
    l = life[page];
#ifdef FAULT_RECLAIM_GRANTED
    if
    :: IN_USE(l) ->
#else
    if
    :: LIFE_STATE(l) == PUBLISHED ->
#endif
        k = key[page];
        w = word[k];
        if
        :: life[page] != l
        :: life[page] == l && IS_DIRTY(w) && NAMES(w, page) ->
            d_step {
                CAS(won, word[k], w, NEXT(w, CACHED, 0, page));
                file_value[k] = (won -> page_value[page] : file_value[k]);
                check()
            }
        :: life[page] == l && IS_CLEAN(w) && NAMES(w, page) ->
#ifdef FAULT_FREE_BEFORE_WORD
            d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }
            d_step { CAS(won, word[k], w, NEXT(w, SPILLED, 0, 0)); check() }
#else
            d_step {
#ifdef FAULT_EVICT_ANY_VERSION
                w = (NAMES(word[k], page) -> word[k] : w);
#endif
                CAS(won, word[k], w, NEXT(w, SPILLED, 0, 0));           /* @evict.word */
                check()
            }
            if
            :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }  /* @evict.free */
            :: else
            fi
#endif
        :: life[page] == l && !NAMES(w, page) ->
            d_step {
#ifdef FAULT_FREE_ANY_LIFE
                l = life[page];
#endif
                CAS(won, life[page], l, ADVANCE(l, FREE, 0));           /* @orphan.free */
                check()
            }
        fi
    :: else
    fi;
    d_step { l = 0; k = 0; w = 0; won = false }
}

inline grant(client) {
    do
    :: atomic {
        if
        :: LIFE_STATE(life[0]) == FREE -> own = 0
        :: LIFE_STATE(life[1]) == FREE -> own = 1
        fi;
        life[own] = ADVANCE(life[own], GRANTED, client);    /* @store.grant */
        check()
        }
        break
    :: LIFE_STATE(life[0]) != FREE && LIFE_STATE(life[1]) != FREE ->
        if
        :: reclaim(0)
        :: reclaim(1)
        fi
    od
}

inline store(client, n, stored) {
    grant(client);
    key[own] = n;
    d_step {    /* @store.fill */
        assert(LIFE_STATE(life[own]) == GRANTED && OWNER(life[own]) == client);
        page_value[own] = stored
    }
#ifdef FAULT_PUBLISH_BEFORE_SWING
    life[own] = PUBLISH(life[own]);
#endif
    do
    :: !won ->
        w = word[n];
        d_step {
            CAS(won, word[n], w, NEXT(w, CACHED, 1, own));  /* @store.swing */
            latest[n] = (won -> stored : latest[n]);
            check()
        }
    :: else -> break
    od;
#ifndef FAULT_PUBLISH_BEFORE_SWING
    life[own] = PUBLISH(life[own]);     /* @store.publish */
#endif
}

inline invalidate_page(n) {
#ifdef FAULT_INVALIDATE_FREES_ONLY
    /* The kernel patch's own fault: the page goes back to the pool and the tree still names it. */
    w = word[n];
    d_step { life[PAGE(w)] = (STATE(w) == CACHED -> ADVANCE(life[PAGE(w)], FREE, 0) : life[PAGE(w)]); check() }
#else
    do
    :: !won ->
        w = word[n];
        d_step {
            CAS(won, word[n], w, NEXT(w, EMPTY, 0, 0));     /* @invalidate.swing */
            latest[n] = (won -> NOTHING : latest[n]);
            check()
        }
    :: else -> break
    od
#endif
}

proctype mortal() {
    short l, w;
    byte k, own;
    bool won;
    {
        store(1, 0, 2)
    } unless { killed };
    gone[1] = true
}

proctype client() {
    short l, w;
    byte k, own;
    bool won;
    if
    :: store(2, 0, 3)
    :: store(2, 1, 3)
    :: invalidate_page(0)
    fi;
    gone[2] = true
}

proctype undertaker() {
    byte page;
    bool named;
    if
    :: killed = true
    :: skip
    fi;
    gone[1];
    do
    :: page < PAGES ->
        if
        :: LIFE_STATE(life[page]) == GRANTED && OWNER(life[page]) == 1 ->
            named = NAMES(word[key[page]], page);
            d_step {    /* @death.grants */
                life[page] = (named -> PUBLISH(life[page]) : ADVANCE(life[page], FREE, 0));
                check()
            }
        :: else
        fi;
        page++
    :: else -> break
    od;
    buried = true
}

/* The broker's sweep, and at the end the judge. */
active proctype sweeper() {
    short l, w;
    byte k;
    bool won;
    d_step {
        life[0] = LIFE(0, PUBLISHED, 0);
        life[1] = LIFE(0, PUBLISHED, 0);
        key[1] = 1;
        page_value[0] = 1; file_value[0] = 1; latest[0] = 1; word[0] = WORD(0, CACHED, 0, 0);
        page_value[1] = 1; file_value[1] = 0; latest[1] = 1; word[1] = WORD(0, CACHED, 1, 1)
    }
    run mortal();
    run client();
    run undertaker();
    do
    :: reclaim(0)
    :: reclaim(1)
    :: gone[1] && gone[2] && buried -> break
    od;
    reclaim(0);
    reclaim(1);
    assert(LIFE_STATE(life[0]) == FREE || NAMES(word[0], 0) || NAMES(word[1], 0));
    assert(LIFE_STATE(life[1]) == FREE || NAMES(word[0], 1) || NAMES(word[1], 1))
}
