//! The engine as its users see it, over stores that are honest, lose power, run full, hang, or lie.
//!
//! | module | what it tests |
//! | --- | --- |
//! | `requests`, `discards`, `batches`, `parallel` | requests, alone, together and of several threads |
//! | `durable`, `background`, `keeper`, `kill`, `hanging`, `device` | what is kept, and when: power, SIGKILL, a panic, a store that hangs, a block device |
//! | `snapshots`, `room`, `full` | snapshots, the room that they use up, and when there is none left |
//! | `resize`, `growth` | other sizes |
//! | `rekey`, `rewrap`, `clone`, `erase`, `slots` | other keys, and none |
//! | `anchors`, `rollback`, `replays` | what the provider decides, and older states that are put back |
//! | `tamper`, `superblocks` | a store that lies |
//! | `damage`, `bitmaps`, `unreadable` | what goes on beside damage |
//! | `model`, `faults`, `sparse`, `owner` | random histories, by what the store does meanwhile |
//! | `fuzz` | parsers |
//!
//! What they share: `common` (a key provider, a store that loses power, seeds), `hooked` (a store with something before its calls), `hostile`
//! (a store that keeps all it ever held), `plain` and `known` (what blocks may hold), `scene` (a volume that lived twice), `three_keys` (one with
//! data under three keys).

mod anchors;
mod background;
mod batches;
mod bitmaps;
mod clone;
mod common;
mod damage;
mod device;
mod discards;
mod durable;
mod erase;
mod faults;
mod full;
mod fuzz;
mod growth;
mod hanging;
mod hooked;
mod hostile;
mod keeper;
mod kill;
mod known;
mod model;
mod owner;
mod parallel;
mod plain;
mod rekey;
mod replays;
mod requests;
mod resize;
mod rewrap;
mod rollback;
mod room;
mod scene;
mod slots;
mod snapshots;
mod sparse;
mod superblocks;
mod tamper;
mod three_keys;
mod unreadable;
