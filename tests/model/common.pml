/*
 * The words of docs/data-plane.md, packed as in shared memory but with fewer bits, and compare-and-swap on them.
 *
 * A word is one short, so that a compare-and-swap compares all of it at once, as the code does. No version, sequence or tag
 * wraps: each model makes fewer changes than the bits can count (9 bits of version, 10 of sequence, 3 of tag).
 *
 * Conventions of all models: one statement, or one d_step, is one access to shared memory; what else stands in a d_step is
 * local to the process or a ghost (a variable that only assertions read). Values are 1..3 and a page holds a value twice, in two
 * halves that are read and written one after the other, so that a torn copy shows.
 */

/* slot word: version · state:3 · DIRTY:1 · page:2 */
#define EMPTY   0
#define CACHED  1
#define SPILLED 2
#define ZERO    3
#define CLOSED  4
#define FILLED  5   /* the payload is a pattern, and no page */

#define WORD(version, state, dirty, page) ((version) << 6 | (state) << 3 | (dirty) << 2 | (page))
#define VERSION(w)  ((w) >> 6)
#define STATE(w)    (((w) >> 3) & 7)
#define DIRTY(w)    (((w) >> 2) & 1)
#define PAGE(w)     ((w) & 3)
#define NEXT(w, state, dirty, page) WORD(VERSION(w) + 1, state, dirty, page)
#define NAMES(w, page)  (STATE(w) == CACHED && PAGE(w) == (page))
#define IS_DIRTY(w)     (STATE(w) == CACHED && DIRTY(w))
#define IS_CLEAN(w)     (STATE(w) == CACHED && !DIRTY(w))

/* life of a page: sequence · state:2 · owner:3 */
#define FREE      0
#define GRANTED   1
#define PUBLISHED 2
#define BUFFER    3

#define LIFE(sequence, state, owner) ((sequence) << 5 | (state) << 3 | (owner))
#define SEQUENCE(l)   ((l) >> 5)
#define LIFE_STATE(l) (((l) >> 3) & 3)
#define OWNER(l)      ((l) & 7)
#define ADVANCE(l, state, owner) LIFE(SEQUENCE(l) + 1, state, owner)
#define PUBLISH(l)    LIFE(SEQUENCE(l), PUBLISHED, 0)
#define IN_USE(l)     (LIFE_STATE(l) == GRANTED || LIFE_STATE(l) == PUBLISHED)

/* side word: writer (client:3 · tag:3) · crc:4; writer 0 is nobody */
#define WRITER(client, tag) ((client) << 3 | (tag))
#define SIDE(writer, crc)   ((writer) << 4 | (crc))
#define WRITER_OF(s)  ((s) >> 4)
#define CLIENT_OF(s)  ((s) >> 7)
#define CRC(s)        ((s) & 15)
#define CRC_OF(first, second) ((first) << 2 | (second))

/* To be used inside a d_step. Without branches, so that "this line was never reached" means what it says. */
#define CAS(won, place, old, new)  won = ((place) == (old)); place = (won -> (new) : (place))
