//! The provider as one value: what every route works with. It is made once per process from a folder:
//!
//! ```text
//! master.key   32 bytes, 0600: opens every key in the database; keep a copy of it apart from the backups
//! keys.db      the database; every key in it is wrapped under the master key
//! ca.pem       the certificate of the authority that VM files pin, for people
//! admin.json   the first administrator's profile, 0600: move it to that person's machine
//! lock         held while a provider serves from the folder
//! ```

use crate::api::TrustView;
use crate::attestation::challenge::Challenges;
use crate::attestation::lanes::Lanes;
use crate::attestation::rules::RulesCache;
use crate::authority::{Authority, AuthorityError, spki_of};
use crate::bounds::PerMinute;
use crate::clock::Clock;
use crate::keystore::{FileKeyStore, KeyLabel, KeyStore, KeyStoreError};
use crate::store::people::Customer;
use crate::store::{self, Database, StoreError};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use policy::config::TrustRoots;
use policy::{CustomerId, Digest};
use rustix::fs::{FlockOperation, Mode, OFlags};
use secretmem::{Secret, SecretBuf};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Common name of the authority that VM files pin.
const AUTHORITY: &str = "fealty provider authority";

/// Common name of the authority that signs administrators' certificates.
const ADMIN_AUTHORITY: &str = "fealty administrators authority";

/// Refusals logged for a customer in a minute.
const REFUSALS: u32 = 120;

/// Reports taken from an instance in a minute, and anchors.
const REPORTS: u32 = 3000;

/// What SQLite keeps beside a database, by the ends of the names.
const SIDE_FILES: [&str; 3] = ["-wal", "-shm", "-journal"];

/// The database of a provider that is being made.
const UNFINISHED_DATABASE: &str = "keys.db.new";

/// Its master key.
const UNFINISHED_MASTER: &str = "master.key.new";

/// Who was refused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refused {
    /// Somebody whose evidence was not verified, or did not come.
    Stranger,
    /// A host whose evidence was verified, by the policy.
    Verified,
}

/// The provider.
pub struct Provider {
    /// The database.
    pub db: Database,
    /// What wraps keys.
    pub keys: Box<dyn KeyStore>,
    /// The clock.
    pub clock: Clock,
    /// Names and addresses of the server; the first is part of every audit log's origin.
    pub names: Vec<String>,
    /// The authority that VM files pin.
    pub authority: Authority,
    /// The authority that signs administrators' certificates.
    pub admin_authority: Authority,
    /// SHA-256 of the authority's SubjectPublicKeyInfo: the pin.
    pub pin: Digest,
    /// Signs receipts.
    pub audit_key: SigningKey,
    /// Signs directives.
    pub directive_key: SigningKey,
    /// Nonces that wait for evidence.
    pub challenges: Challenges,
    /// Places for evidence that is being read.
    pub lanes: Lanes,
    /// Parsed policies.
    pub rules: RulesCache,
    /// Bounds what those who are refused write into a customer's audit log.
    pub refusals: PerMinute<(CustomerId, Refused)>,
    /// Bounds what an instance, by its client key, reports.
    pub reports: PerMinute<Digest>,
    /// The same for anchors, apart: a guest that flushes all the while keeps no report, its end's least of all, from being taken.
    pub anchors: PerMinute<Digest>,
    /// Its folder.
    pub dir: PathBuf,
    _lock: OwnedFd,
}

/// An Ed25519 key of the provider.
pub struct SigningKey {
    /// RFC 8032 seed.
    pub seed: Secret<32>,
    /// Public key.
    pub public: [u8; 32],
}

/// Why a provider can't be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The folder can't be used.
    #[error("{0} can't be used")]
    Folder(PathBuf, #[source] std::io::Error),
    /// Something is there already.
    #[error("{0} exists already; a provider is made in a folder of its own")]
    Exists(PathBuf),
    /// What SQLite kept beside a database that is gone: it would be replayed into the new one.
    #[error("{0} is left of another database and would be replayed into the new one; move it away first")]
    Left(PathBuf),
    /// Nothing is there.
    #[error("{0} is missing; make a provider with `fealty-keys init`, or bring one back with `fealty-keys restore`")]
    Missing(PathBuf),
    /// Another process serves from it.
    #[error("another process uses {0}; one provider serves from a folder")]
    Busy(PathBuf),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The master key.
    #[error(transparent)]
    Key(#[from] KeyStoreError),
    /// A certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A key that is none.
    #[error("the provider's own {0} key can't be read")]
    OwnKey(&'static str),
    /// No memory for keys.
    #[error("no protected memory for keys")]
    Memory(#[from] secretmem::SecretError),
    /// No name.
    #[error("a provider needs 1 to 16 names: DNS names or addresses under which hosts reach it")]
    Names,
}

impl SigningKey {
    fn random() -> Result<Self, ProviderError> {
        Self::from_seed(Secret::random()?)
    }

    fn from_seed(seed: Secret<32>) -> Result<Self, ProviderError> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.expose()).map_err(|_| ProviderError::OwnKey("signing"))?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| ProviderError::OwnKey("signing"))?;
        Ok(Self { seed, public })
    }
}

impl Provider {
    /// Path of the database in a provider's folder.
    pub fn database_path(dir: &Path) -> PathBuf {
        dir.join("keys.db")
    }

    /// Fails where a database lies in `dir`, or what SQLite would replay into a new one of that name.
    pub fn no_database(dir: &Path) -> Result<(), ProviderError> {
        let database = Self::database_path(dir);
        if database.exists() {
            return Err(ProviderError::Exists(database));
        }
        let left = SIDE_FILES.map(|end| beside(&database, end)).into_iter().find(|path| path.exists());
        left.map_or(Ok(()), |path| Err(ProviderError::Left(path)))
    }

    /// Path of the master key in a provider's folder.
    pub fn master_path(dir: &Path) -> PathBuf {
        dir.join("master.key")
    }

    /// Makes a new provider called `names` in `dir`: authorities, keys, an empty database. Master key and database get their
    /// names with [`Self::finish`]; until then `dir` holds no provider, and what a maker left that was killed is made anew.
    pub async fn create(dir: &Path, names: &[String]) -> Result<Self, ProviderError> {
        check_names(names)?;
        let folder = |e: std::io::Error| ProviderError::Folder(dir.to_owned(), e);
        std::fs::create_dir_all(dir).map_err(folder)?;
        rustix::fs::chmod(dir, Mode::RWXU).map_err(|e| folder(e.into()))?;
        let lock = lock(dir)?;
        Self::no_database(dir)?;
        if Self::master_path(dir).exists() {
            return Err(ProviderError::Exists(Self::master_path(dir)));
        }
        discard(&dir.join(UNFINISHED_DATABASE));
        let _ = std::fs::remove_file(dir.join(UNFINISHED_MASTER));
        let keys = FileKeyStore::create(&dir.join(UNFINISHED_MASTER))?;
        let db = Database::open(&dir.join(UNFINISHED_DATABASE), true).await?;
        Self::fill(&db, &keys, names).await?;
        Self::with(dir, lock, Box::new(keys), db).await
    }

    /// Ends what [`Self::create`] began, durably: the database gets its name, then the master key.
    pub async fn finish(self) -> Result<(), ProviderError> {
        let database = self.dir.join(UNFINISHED_DATABASE);
        // The last connection folds the write-ahead log into the database.
        self.db.close().await;
        if beside(&database, SIDE_FILES[0]).exists() {
            return Err(ProviderError::Left(beside(&database, SIDE_FILES[0])));
        }
        let named = std::fs::rename(&database, Self::database_path(&self.dir));
        named.map_err(|e| ProviderError::Folder(database, e))?;
        name_master(&self.dir)
    }

    /// Opens the provider in `dir`.
    pub async fn open(dir: &Path) -> Result<Self, ProviderError> {
        // A maker that was killed between the two names: everything is there.
        if Self::database_path(dir).exists() && !Self::master_path(dir).exists() && dir.join(UNFINISHED_MASTER).exists()
        {
            name_master(dir)?;
        }
        for path in [Self::database_path(dir), Self::master_path(dir)] {
            if !path.exists() {
                return Err(ProviderError::Missing(path));
            }
        }
        let lock = lock(dir)?;
        let keys = FileKeyStore::open(&Self::master_path(dir))?;
        let db = Database::open(&Self::database_path(dir), false).await?;
        Self::with(dir, lock, Box::new(keys), db).await
    }

    async fn fill(db: &Database, keys: &dyn KeyStore, names: &[String]) -> Result<(), ProviderError> {
        let now_us = Clock::start(0).now_us();
        let mut tx = db.write().await?;
        for (name, title) in [("authority", AUTHORITY), ("admin-authority", ADMIN_AUTHORITY)] {
            let (authority, secret) = Authority::create(title, now_us)?;
            let wrapped = keys.wrap(KeyLabel::Provider(name), secret.expose())?;
            store::add_provider_key(&mut tx, name, &wrapped, authority.certificate()).await?;
        }
        for name in ["audit", "directive"] {
            let key = SigningKey::random()?;
            let wrapped = keys.wrap(KeyLabel::Provider(name), key.seed.expose())?;
            store::add_provider_key(&mut tx, name, &wrapped, &key.public).await?;
        }
        store::set_meta(&mut tx, "names", &names.join(",")).await?;
        tx.commit().await.map_err(StoreError::from)?;
        Ok(())
    }

    async fn with(dir: &Path, lock: OwnedFd, keys: Box<dyn KeyStore>, db: Database) -> Result<Self, ProviderError> {
        let mut reader = db.read().await?;
        let names = store::meta(&mut reader, "names").await?.ok_or(StoreError::Damaged("set of names"))?;
        let names: Vec<String> = names.split(',').map(str::to_owned).collect();
        check_names(&names)?;
        let latest_us = store::latest_us(&mut reader).await?;
        let clock = Clock::start(latest_us);
        let mut tx = db.write().await?;
        store::instances::lengthen_leases(&mut tx, latest_us, clock.now_us()).await?;
        tx.commit().await.map_err(StoreError::from)?;
        let unwrap = async |reader: &mut sqlx::SqliteConnection, name: &'static str| {
            let (wrapped, public) = store::provider_key(reader, name).await?;
            let key = keys.unwrap(KeyLabel::Provider(name), &wrapped)?;
            Ok::<(SecretBuf, Vec<u8>), ProviderError>((key, public))
        };
        let (key, certificate) = unwrap(&mut reader, "authority").await?;
        let authority = Authority::open(AUTHORITY, &certificate, &key)?;
        let (key, certificate) = unwrap(&mut reader, "admin-authority").await?;
        let admin_authority = Authority::open(ADMIN_AUTHORITY, &certificate, &key)?;
        let mut signing = Vec::new();
        for name in ["audit", "directive"] {
            let (wrapped, public) = store::provider_key(&mut reader, name).await?;
            let key = SigningKey::from_seed(keys.unwrap_32(KeyLabel::Provider(name), &wrapped)?)?;
            if key.public[..] != public[..] {
                return Err(ProviderError::OwnKey(name));
            }
            signing.push(key);
        }
        drop(reader);
        let directive_key = signing.pop().ok_or(ProviderError::OwnKey("directive"))?;
        let audit_key = signing.pop().ok_or(ProviderError::OwnKey("audit"))?;
        let spki = spki_of(authority.certificate()).ok_or(ProviderError::OwnKey("authority"))?;
        Ok(Self {
            db,
            keys,
            clock,
            names,
            pin: Digest::of(&spki),
            authority,
            admin_authority,
            audit_key,
            directive_key,
            challenges: Challenges::default(),
            lanes: Lanes::default(),
            rules: RulesCache::default(),
            refusals: PerMinute::new(REFUSALS),
            reports: PerMinute::new(REPORTS),
            anchors: PerMinute::new(REPORTS),
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// Origin line of a customer's audit log.
    pub fn audit_origin(&self, customer: &CustomerId) -> String {
        format!("{}/{customer}", self.names[0])
    }

    /// What the VM files of a customer seal as trust roots; `policy_version` is that of the policy in force, 0 without one.
    pub fn trust(&self, customer: &Customer, policy_version: u64) -> TrustView {
        TrustView {
            trust: TrustRoots {
                policy_key: customer.policy_key[..].into(),
                policy_version,
                directive_key: self.directive_key.public[..].into(),
                audit_origin: self.audit_origin(&customer.id),
                audit_key: self.audit_key.public[..].into(),
            },
            pin: self.pin,
        }
    }
}

fn check_names(names: &[String]) -> Result<(), ProviderError> {
    let good = |n: &String| !n.is_empty() && n.len() <= 253 && !n.contains([',', '/', ' ', '\n']);
    if (1..=16).contains(&names.len()) && names.iter().all(good) { Ok(()) } else { Err(ProviderError::Names) }
}

/// Gives the master key of a provider that is made its name.
fn name_master(dir: &Path) -> Result<(), ProviderError> {
    let named = std::fs::rename(dir.join(UNFINISHED_MASTER), Provider::master_path(dir));
    let durable = named.and_then(|()| std::fs::File::open(dir)?.sync_all());
    durable.map_err(|e| ProviderError::Folder(dir.to_owned(), e))
}

/// Removes a database that was never served from, and what SQLite kept beside it.
pub fn discard(database: &Path) {
    let _ = std::fs::remove_file(database);
    for end in SIDE_FILES {
        let _ = std::fs::remove_file(beside(database, end));
    }
}

fn beside(database: &Path, end: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(end);
    path.into()
}

/// Takes the folder's lock for as long as the descriptor lives.
pub fn lock(dir: &Path) -> Result<OwnedFd, ProviderError> {
    let path = dir.join("lock");
    let failed = |e: rustix::io::Errno| ProviderError::Folder(path.clone(), e.into());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(fd),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ProviderError::Busy(dir.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::audit::{Draft, append};
    use crate::store::instances::{self, Instance};
    use crate::store::vms;
    use crate::store::volumes::{self, Holder, HolderKind, Volume};
    use policy::audit::{Actor, AuditKind};
    use policy::{HostId, InstanceNumber, KeyId, OpenNumber, VmId, VolumeId};

    fn instance(customer: &CustomerId, vm: &VmId, lease_end_us: u64) -> Instance {
        Instance {
            customer: customer.clone(),
            vm: vm.clone(),
            number: InstanceNumber::try_from(1).expect("a number"),
            client_key: Digest([1; 32]),
            host: HostId(Digest([2; 32])),
            ak: vec![3],
            reset_count: 1,
            file: Digest([4; 32]),
            started_us: 1_000_000,
            lease_end_us,
            lease_us: 600_000_000,
            ended: false,
            revoked: false,
            report_sequence: 0,
            report_digest: Digest([5; 32]),
            gap_at: 0,
        }
    }

    #[tokio::test]
    async fn a_wall_clock_that_is_ahead_at_the_start_ends_no_lease() {
        const SECOND: u64 = 1_000_000;
        let dir = tempfile::tempdir().expect("a folder");
        let made = Provider::create(dir.path(), &["localhost".to_owned()]).await.expect("made");
        // Everything was recorded at the beginning of 1970: the wall clock of now is some fifty years ahead.
        let (acme, live, dead) =
            ("acme".parse().expect("label"), "live".parse().expect("label"), "dead".parse().expect("label"));
        let mut tx = made.db.write().await.expect("begins");
        let customer = Customer { id: acme, lab: true, policy_key: [0; 32] };
        let acme = &customer.id;
        store::people::create_customer(&mut tx, &customer, SECOND).await.expect("created");
        let volume = Volume {
            id: VolumeId([6; 16]),
            customer: acme.clone(),
            name: "root".into(),
            kek_id: KeyId(1),
            kek_wrapped: vec![],
            key_id: None,
            next_open: 1,
            anchor: None,
            unconfirmed: false,
            size: None,
            retired: false,
            rekey: None,
            next_kek: None,
        };
        volumes::create(&mut tx, &volume, SECOND).await.expect("created");
        for (vm, end_us) in [(&live, 700 * SECOND), (&dead, 50 * SECOND)] {
            let instance = instance(acme, vm, end_us);
            vms::create(&mut tx, acme, vm, instance.number).await.expect("created");
            instances::add_instance(&mut tx, &instance).await.expect("added");
        }
        // It was restored, and waits for leases that nobody here saw.
        sqlx::query("UPDATE vms SET unconfirmed_until_us = ? WHERE id = 'live'")
            .bind((700 * SECOND) as i64)
            .execute(&mut *tx)
            .await
            .expect("set");
        let kind = HolderKind::Instance(live.clone(), InstanceNumber::try_from(1).expect("a number"));
        let open_number = OpenNumber::try_from(1).expect("a number");
        let holder = Holder { kind, client_key: Digest([1; 32]), open_number, until_us: 700 * SECOND, operation: None };
        volumes::hold(&mut tx, &volume.id, &holder).await.expect("held");
        append(&mut tx, 100 * SECOND, Draft::new(acme, Actor::Provider, AuditKind::Report)).await.expect("logged");
        tx.commit().await.expect("committed");
        made.finish().await.expect("finished");

        let started = Provider::open(dir.path()).await.expect("opens");
        let mut reader = started.db.read().await.expect("reads");
        let now_us = started.clock.now_us();
        let past = async |reader: &mut _, vm: &VmId| {
            let instance = instances::last_instance(reader, acme, vm).await.expect("read").expect("there");
            crate::attestation::lease_past(&instance, now_us + 590 * SECOND)
        };
        assert!(!past(&mut reader, &live).await, "it may have all of its lease left");
        assert!(past(&mut reader, &dead).await, "past before the provider ended");
        let waits = async |reader: &mut _, vm: &VmId| {
            vms::find(reader, acme, vm).await.expect("read").expect("there").unconfirmed_until_us
        };
        assert!(waits(&mut reader, &live).await > now_us + 604_000 * SECOND);
        assert_eq!(waits(&mut reader, &dead).await, 0, "it waits for nothing");
        let holder = volumes::holder(&mut reader, &volume.id).await.expect("read").expect("held");
        assert!(crate::admin::volumes::holds(&holder, now_us + 590 * SECOND));
        drop(reader);

        // And the clock never starts before what any log says.
        let far_us = 9_000_000_000 * SECOND;
        let mut tx = started.db.write().await.expect("begins");
        append(&mut tx, far_us, Draft::new(acme, Actor::Provider, AuditKind::Report)).await.expect("logged");
        tx.commit().await.expect("committed");
        started.db.close().await;
        drop(started);
        assert!(Provider::open(dir.path()).await.expect("opens").clock.now_us() >= far_us);
    }
}
