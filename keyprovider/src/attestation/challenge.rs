//! Nonces that wait for evidence. They live in memory only: a provider that was restarted, or restored from a backup, knows
//! none of its predecessor's. Taking one is a single step under one lock, so of two that come at once one wins; the other
//! waits for the same answer if its bytes are the same, and is stale otherwise.

use super::lanes::Lane;
use crate::server::problem::Refusal;
use attest::eventlog::ima::ImaState;
use attest::protocol::ProblemType;
use policy::operation::{Operation, OperationRequest};
use policy::{AttestationId, CustomerId, Digest, HostId, Nonce, VmId};
use secretmem::Secret;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// How long a nonce lives, in microseconds.
pub const NONCE_US: u64 = 60_000_000;

/// The most attestations of one client key that wait for evidence.
const PER_KEY: usize = 4;

/// The most attestations of one client key in a minute, refused ones counted.
const PER_KEY_AND_MINUTE: usize = 120;

/// The most starts that one address has asked for within a nonce's life. Instances are no strangers: theirs count by key alone.
const PER_ADDRESS: usize = 2048;

/// The most starts that all have asked for.
const ALL: usize = 16_384;

/// What was asked, and what the answer must prove.
pub struct Challenge {
    /// The attestation.
    pub id: AttestationId,
    /// To be bound by the quote.
    pub nonce: Nonce,
    /// Whose VM.
    pub customer: CustomerId,
    /// Which VM.
    pub vm: VmId,
    /// What for.
    pub operation: OperationRequest,
    /// SHA-256 of the client key.
    pub client_key: Digest,
    /// The host, by its endorsement key.
    pub host: HostId,
    /// TPMT_PUBLIC of the attestation key: the activated record's, or the one that the credential was made for.
    pub ak_public: Vec<u8>,
    /// Its name.
    pub ak_name: Vec<u8>,
    /// The credential's secret, where the key has yet to be proved.
    pub secret: Option<Secret<32>>,
    /// The PCRs to quote.
    pub pcrs: Vec<u8>,
    /// The version of the reference values that say so.
    pub reference: u64,
    /// Where the wanted part of the IMA log begins.
    pub ima: Option<ImaStart>,
    /// When the nonce ends.
    pub until_us: u64,
    /// Who asked.
    pub address: IpAddr,
}

impl Challenge {
    /// When the nonce was issued: the quote that holds it is not older.
    pub fn asked_us(&self) -> u64 {
        self.until_us.saturating_sub(NONCE_US)
    }

    /// Everything but a start was asked for by the newest instance itself.
    fn lane(&self) -> Lane {
        match self.operation.operation {
            Operation::PowerOn => Lane::start(self.host, self.address),
            _ => Lane::Instance(self.client_key),
        }
    }
}

/// Where a wanted IMA log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImaStart {
    /// The boot that the state belongs to; none at offset 0.
    pub reset_count: Option<u32>,
    /// Bytes already replayed, and PCR 10 after them.
    pub state: ImaState,
}

/// An answer to evidence: a body, or a refusal.
pub type Answer = Result<Arc<Vec<u8>>, Refusal>;

/// What a client gets for its evidence.
pub enum Taken {
    /// It is the first: judge it and publish the answer.
    Judge(Box<Challenge>, watch::Sender<Option<Answer>>),
    /// The same bytes are being judged or were: here is where their answer appears.
    Wait(watch::Receiver<Option<Answer>>),
    /// There is no such nonce here.
    Unknown,
    /// The nonce was used with other bytes, or by another key.
    Stale,
}

enum Stage {
    Open(Box<Challenge>),
    Taken { evidence: Digest, answer: watch::Receiver<Option<Answer>> },
}

struct Entry {
    stage: Stage,
    client_key: Digest,
    vm: VmId,
    address: IpAddr,
    lane: Lane,
    until_us: u64,
}

/// Every nonce that lives.
#[derive(Default)]
pub struct Challenges(Mutex<HashMap<AttestationId, Entry>>);

impl Challenges {
    /// Keeps a challenge until its nonce's end.
    pub fn add(&self, challenge: Challenge, now_us: u64) -> Result<(), Refusal> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, entry| entry.until_us > now_us);
        let of_key = || all.values().filter(|e| e.client_key == challenge.client_key);
        let waiting = of_key().filter(|e| matches!(e.stage, Stage::Open(_))).count();
        let starts = || all.values().filter(|e| matches!(e.lane, Lane::Host(..)));
        let many_starts =
            || starts().count() >= ALL || starts().filter(|e| e.address == challenge.address).count() >= PER_ADDRESS;
        let start = matches!(challenge.lane(), Lane::Host(..));
        if waiting >= PER_KEY || of_key().count() >= PER_KEY_AND_MINUTE || (start && many_starts()) {
            return Err(Refusal::new(ProblemType::TooMuch, "too many attestations are open")
                .hint("answer the ones that are, or wait a minute until their nonces end"));
        }
        let id = challenge.id;
        let entry = Entry {
            client_key: challenge.client_key,
            vm: challenge.vm.clone(),
            address: challenge.address,
            lane: challenge.lane(),
            until_us: challenge.until_us,
            stage: Stage::Open(Box::new(challenge)),
        };
        all.insert(id, entry);
        Ok(())
    }

    /// The lane of this client's attestation of this VM, open or answered: asked before its body is read.
    pub fn lane(&self, id: &AttestationId, client_key: &Digest, vm: &VmId, now_us: u64) -> Option<Lane> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.get(id).filter(|e| e.client_key == *client_key && e.vm == *vm && e.until_us > now_us);
        entry.map(|e| e.lane)
    }

    /// Forgets an attestation whose answer is kept elsewhere.
    pub fn forget(&self, id: &AttestationId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// Consumes the nonce for `evidence`, the digest of the evidence's bytes.
    pub fn take(&self, id: &AttestationId, client_key: &Digest, evidence: &Digest, now_us: u64) -> Taken {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = all.get_mut(id) else { return Taken::Unknown };
        if entry.client_key != *client_key || entry.until_us <= now_us {
            return Taken::Stale;
        }
        let (sender, receiver) = watch::channel(None);
        let taken = Stage::Taken { evidence: *evidence, answer: receiver };
        match &entry.stage {
            Stage::Taken { evidence: first, answer } if first == evidence => return Taken::Wait(answer.clone()),
            Stage::Taken { .. } => return Taken::Stale,
            Stage::Open(_) => {}
        }
        match std::mem::replace(&mut entry.stage, taken) {
            Stage::Open(challenge) => Taken::Judge(challenge, sender),
            Stage::Taken { .. } => Taken::Stale,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(id: u8, key: u8) -> Challenge {
        asked(AttestationId([id; 16]), Digest([key; 32]), Operation::PowerOn)
    }

    fn asked(id: AttestationId, client_key: Digest, operation: Operation) -> Challenge {
        let AttestationId([first, ..]) = id;
        Challenge {
            id,
            nonce: Nonce([first; 32]),
            customer: "acme".parse().expect("label"),
            vm: "payroll".parse().expect("label"),
            operation: OperationRequest::plain(operation),
            client_key,
            host: HostId(Digest([1; 32])),
            ak_public: vec![],
            ak_name: vec![],
            secret: None,
            pcrs: vec![],
            reference: 1,
            ima: None,
            until_us: 100,
            address: IpAddr::from([127, 0, 0, 1]),
        }
    }

    #[test]
    fn attack_01_a_nonce_is_consumed_once() {
        let all = Challenges::default();
        all.add(challenge(1, 1), 0).expect("room");
        let (id, key) = (AttestationId([1; 16]), Digest([1; 32]));
        let (first, other) = (Digest([7; 32]), Digest([8; 32]));
        assert!(matches!(all.take(&id, &Digest([2; 32]), &first, 1), Taken::Stale), "another key");
        let Taken::Judge(_, sender) = all.take(&id, &key, &first, 1) else { panic!("the first wins") };
        assert!(matches!(all.take(&id, &key, &other, 1), Taken::Stale), "other bytes");
        let Taken::Wait(answer) = all.take(&id, &key, &first, 1) else { panic!("the same bytes wait") };
        sender.send_replace(Some(Ok(Arc::new(vec![5]))));
        assert_eq!(answer.borrow().as_ref().and_then(|a| a.as_ref().ok()).map(|b| b.to_vec()), Some(vec![5]));
        assert!(matches!(all.take(&id, &key, &first, 100), Taken::Stale), "after its end");
        assert!(matches!(all.take(&AttestationId([9; 16]), &key, &first, 1), Taken::Unknown));
    }

    #[test]
    fn of_many_threads_one_takes_the_nonce() {
        let all = Challenges::default();
        all.add(challenge(1, 1), 0).expect("room");
        let won = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for n in 0..16 {
                let (all, won) = (&all, &won);
                scope.spawn(move || {
                    let taken = all.take(&AttestationId([1; 16]), &Digest([1; 32]), &Digest([n; 32]), 1);
                    if matches!(taken, Taken::Judge(..)) {
                        won.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(won.into_inner(), 1);
    }

    #[test]
    fn attack_39_open_attestations_are_bounded_and_expire() {
        let all = Challenges::default();
        for id in 0..PER_KEY as u8 {
            all.add(challenge(id, 1), 0).expect("room");
        }
        assert_eq!(all.add(challenge(99, 1), 0).map_err(|r| r.kind), Err(ProblemType::TooMuch));
        assert!(all.add(challenge(99, 2), 0).is_ok(), "another key has its own bound");
        assert!(all.add(challenge(98, 1), 100).is_ok(), "the old ones are gone");
    }
    #[test]
    fn attack_39_starts_of_strangers_leave_instances_of_their_address_their_room() {
        let all = Challenges::default();
        let id = |n: usize| AttestationId((n as u128).to_le_bytes());
        let mut starts = 0;
        while all.add(asked(id(starts), Digest::of(&starts.to_le_bytes()), Operation::PowerOn), 0).is_ok() {
            starts += 1;
        }
        assert_eq!(starts, PER_ADDRESS);
        for n in 0..PER_KEY {
            all.add(asked(id(starts + 1 + n), Digest([9; 32]), Operation::Renew), 0).expect("an instance has its own");
        }
        let fifth = asked(id(starts + 99), Digest([9; 32]), Operation::Renew);
        assert_eq!(all.add(fifth, 0).map_err(|r| r.kind), Err(ProblemType::TooMuch));
    }
}
