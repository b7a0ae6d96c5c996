/*
 * A claim that several processes share, and who shares it according to the arena, when the broker is killed at any step.
 *
 * Client A claims; the broker lets B join. Both leave, by message, in either order. Client C claims next, or seizes what a dead broker
 * had in its hands, and forks: it marks its claim as shared itself, and the broker takes its child D in later. C and D leave. The
 * broker may be killed at any step, twice, and the next takes over.
 *
 * Shows: no range is lent while a process that shares its claim has not left; once all have left it is lent; the bits of a claim never
 * count for another.
 *
 * Bounds: two claims, two sharers each, two deaths. Abstracted: a message is a bit that stays until it is served, so that it survives the
 * broker; A does not end its claim by itself, so the CAS that marks it is not lost; so does a forked child's record; lives and copies (reserve.pml, recover_range.pml).
 */
#include "common.pml"

#define LENT    0
#define BROKER  1
#define A       2
#define B       3
#define C       4
#define D       5
#define DEATHS  2

/* claim: generation · shared:1 · client:3 */
#define CLAIM(generation, shared, client) ((generation) << 4 | (shared) << 3 | (client))
#define CLAIMER(c)  ((c) & 7)
#define SHARED(c)   (((c) >> 3) & 1)
#define HAND(c, client) CLAIM(((c) >> 4) + 1, 0, client)
#define BIT(client) (1 << (client))

short claim = CLAIM(1, 0, A);
byte  bits;             /* who shares it; none while it is shared: who made it */
bool  joins, forked;    /* asked for, and not served yet: B's hand-over, D's record */
byte  leaves;           /* the same: who leaves, one bit each */
byte  killed, ended;
bool  ended_broker;     /* and none has signed since */
bool  gone_a, gone_c;

byte  users = BIT(A);   /* ghost: who has the range, one bit each */

#define SHARERS(c) (bits -> bits : BIT(CLAIMER(c)))

inline hand(client) {
    CAS(won, claim, c, HAND(c, client));
    c = (won -> claim : c);
    assert(!won || client != LENT || !users)
}

proctype client_a() {
    joins = true;
    !joins;                                         /* B has its answer */
    if
    :: d_step { users = users & ~BIT(B); leaves = leaves | BIT(B) }
       d_step { users = users & ~BIT(A); leaves = leaves | BIT(A) }
    :: d_step { users = users & ~BIT(A); leaves = leaves | BIT(A) }
       d_step { users = users & ~BIT(B); leaves = leaves | BIT(B) }
    fi;
    gone_a = true
}

proctype client_c() {
    short c;
    bool won;
    do
    :: atomic { CLAIMER(claim) == LENT || (CLAIMER(claim) == BROKER && ended_broker) -> c = claim }
        if
        :: CLAIMER(c) == LENT -> d_step { hand(C); users = (won -> BIT(C) : users) }
        :: CLAIMER(c) == BROKER && ended_broker ->
            d_step { hand(C); users = (won -> BIT(C) : users) }
#ifndef FAULT_SEIZED_KEEPS_BITS
            if
            :: won -> bits = 0
            :: !won
            fi
#endif
        :: CLAIMER(c) == BROKER && !ended_broker
        fi;
        if
        :: won -> break
        :: !won
        fi
    od;
    assert(claim == c);
    claim = c | 8;          /* @claim.share */
    d_step { forked = true; users = users | BIT(D) }
    if
    :: d_step { users = users & ~BIT(C); leaves = leaves | BIT(C) }
       d_step { users = users & ~BIT(D); leaves = leaves | BIT(D) }
    :: d_step { users = users & ~BIT(D); leaves = leaves | BIT(D) }
       d_step { users = users & ~BIT(C); leaves = leaves | BIT(C) }
    fi;
    gone_c = true
}

inline lend() {
#ifndef FAULT_LEND_KEEPS_BITS
    bits = 0;
#endif
    d_step { hand(LENT); assert(won) }
}

/* SHARED first, then the bits, the maker's first: killed in between, who joins got no answer, and no bits mean the maker alone. */
inline join() {
    c = claim;
    d_step { assert(CLAIMER(c) == A); claim = c | 8 }
    bits = bits | BIT(A);
    bits = bits | BIT(B);
    d_step { users = users | BIT(B); joins = false }
}

/* A forked child shares what its parent has marked. Its record stays marked until this is done. */
inline inherit() {
    c = claim;
    if
    :: SHARED(c) && (SHARERS(c) & BIT(C)) ->
        bits = bits | BIT(C);
        bits = bits | BIT(D)
    :: !SHARED(c) || !(SHARERS(c) & BIT(C))
    fi;
    forked = false
}

inline leave(client) {
    c = claim;
    if
    :: SHARED(c) && SHARERS(c) == BIT(client) ->
#ifdef FAULT_BITS_BEFORE_SEIZE
        bits = 0;
#endif
        d_step { hand(BROKER); assert(won) }
        lend()
    :: SHARED(c) && SHARERS(c) != BIT(client) -> bits = bits & ~BIT(client)
    :: !SHARED(c)
    fi;
    leaves = leaves & ~BIT(client)
}

active proctype broker() {
    short c;
    bool won;
    run client_a();
    run client_c();
    do
    :: {
        if
        :: ended ->
            ended_broker = false;
            do
            :: c = claim;
                if
                :: CLAIMER(c) == BROKER ->
                    d_step { hand(BROKER) }
                    if
                    :: won -> lend(); break
                    :: !won
                    fi
                :: CLAIMER(c) != BROKER -> break
                fi
            od
        :: !ended
        fi;
        do
        :: joins -> join()
        :: forked -> inherit()
        :: !forked && (leaves & BIT(A)) -> leave(A)
        :: !forked && (leaves & BIT(B)) -> leave(B)
        :: !forked && (leaves & BIT(C)) -> leave(C)
        :: !forked && (leaves & BIT(D)) -> leave(D)
        :: gone_a && gone_c && !leaves && !forked -> break
        od;
        break
       } unless { killed > ended };
       atomic { ended++; ended_broker = true; c = 0; won = false }
    od;
    assert(CLAIMER(claim) == LENT && !bits)
}

active proctype killer() {
    do
    :: killed < DEATHS -> killed++
    :: break
    od
}
