//! The types that users see. None of them is `Debug`, `Clone` or `Serialize`.
#![allow(unsafe_code)]

use crate::SecretError;
use crate::arena::{Arena, GLOBAL, Slot};
use crate::process::wipe;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use subtle::ConstantTimeEq;

/// A key of `N` bytes (1 to 1 MiB) in secret pages.
pub struct Secret<const N: usize> {
    slot: Slot,
}

impl<const N: usize> Secret<N> {
    /// All zero: to be written through [`expose_mut`](Self::expose_mut).
    pub fn zeroed() -> Result<Self, SecretError> {
        Self::zeroed_in(&GLOBAL)
    }

    pub(crate) fn zeroed_in(arena: &'static Arena) -> Result<Self, SecretError> {
        const { assert!(N > 0 && N <= SecretBuf::MAX, "a secret has 1 byte to 1 MiB") };
        Ok(Self { slot: arena.allocate(N, 1)? })
    }

    /// Fresh random bytes, written by the kernel straight into the page.
    pub fn random() -> Result<Self, SecretError> {
        let mut secret = Self::zeroed()?;
        getrandom::fill(secret.slot.bytes_mut()).map_err(SecretError::Random)?;
        Ok(secret)
    }

    /// Moves `bytes` in: the source is wiped, whether or not this succeeds.
    pub fn take(bytes: &mut [u8; N]) -> Result<Self, SecretError> {
        let taken = Self::copy_of(bytes);
        wipe(bytes);
        taken
    }

    /// Copies `bytes` in; the source stays as it is. For bytes that lie in another secret.
    pub fn copy_of(bytes: &[u8; N]) -> Result<Self, SecretError> {
        let mut secret = Self::zeroed()?;
        secret.slot.bytes_mut().copy_from_slice(bytes);
        Ok(secret)
    }

    /// The bytes. What copies them to elsewhere wipes its copy.
    pub fn expose(&self) -> &[u8; N] {
        // SAFETY: the slot holds exactly N initialised bytes, shared while `self` is; an array of bytes needs no alignment.
        unsafe { self.slot.start().cast::<[u8; N]>().as_ref() }
    }

    /// The bytes, to be written.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as in `expose`; `&mut self` makes this the only reference.
        unsafe { self.slot.start().cast::<[u8; N]>().as_mut() }
    }

    /// Whether both are the same, in time that does not depend on where they differ.
    pub fn ct_eq(&self, other: &Self) -> bool {
        self.slot.bytes().ct_eq(other.slot.bytes()).into()
    }
}

/// Secret bytes whose number is known at run time only.
pub struct SecretBuf {
    slot: Slot,
}

#[allow(clippy::len_without_is_empty, reason = "it is never empty")]
impl SecretBuf {
    /// The most bytes that one buffer holds: 1 MiB.
    pub const MAX: usize = 1 << 20;

    /// `len` zero bytes, 1 to [`MAX`](Self::MAX).
    pub fn with_len(len: usize) -> Result<Self, SecretError> {
        Self::with_len_in(len, &GLOBAL)
    }

    pub(crate) fn with_len_in(len: usize, arena: &'static Arena) -> Result<Self, SecretError> {
        if !(1..=Self::MAX).contains(&len) {
            return Err(SecretError::Length(len));
        }
        Ok(Self { slot: arena.allocate(len, 1)? })
    }

    /// Moves `bytes` in: the source is wiped, whether or not this succeeds.
    pub fn take(bytes: &mut [u8]) -> Result<Self, SecretError> {
        let taken = Self::copy_of(bytes);
        wipe(bytes);
        taken
    }

    /// Copies `bytes` in; the source stays as it is. For bytes that lie in another secret.
    pub fn copy_of(bytes: &[u8]) -> Result<Self, SecretError> {
        let mut secret = Self::with_len(bytes.len())?;
        secret.slot.bytes_mut().copy_from_slice(bytes);
        Ok(secret)
    }

    /// The bytes. What copies them to elsewhere wipes its copy.
    pub fn expose(&self) -> &[u8] {
        self.slot.bytes()
    }

    /// The bytes, to be written.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        self.slot.bytes_mut()
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.slot.len()
    }
}

/// A value (an expanded key schedule, a cipher's state) that lives in secret pages. What it points to elsewhere is not
/// protected, so `T` should own no heap. On drop `T` is dropped, then its bytes are wiped.
pub struct SecretBox<T> {
    slot: Slot,
    holds: PhantomData<T>,
}

impl<T> SecretBox<T> {
    /// Moves `value` in and wipes the copy that this call received. Copies that the compiler made before are out of its
    /// reach: build the value inside [`wiping_stack`](crate::wiping_stack).
    pub fn new(value: T) -> Result<Self, SecretError> {
        let mut value = MaybeUninit::new(value);
        let slot = Self::empty();
        match &slot {
            // SAFETY: both places are valid for size_of::<T>() bytes, aligned for T, and apart. The value's ownership moves to
            // the slot: `value` is a MaybeUninit, so it is not dropped here.
            Ok(slot) => unsafe { slot.start().cast::<T>().as_ptr().copy_from_nonoverlapping(value.as_ptr(), 1) },
            // SAFETY: `value` was initialised above and is not used after this but as bytes.
            Err(_) => unsafe { value.assume_init_drop() },
        }
        wipe_place(&mut value);
        Ok(Self { slot: slot?, holds: PhantomData })
    }

    /// Builds the value in its place: `build` fills the slot and returns the filled reference.
    ///
    /// ```
    /// # use fealty_secretmem::{SecretBox, SecretError};
    /// let made = SecretBox::try_new_with(|slot| Ok::<_, SecretError>(slot.write([1_u32, 2, 3])))?;
    /// assert_eq!(made.expose(), &[1, 2, 3]);
    /// # Ok::<(), SecretError>(())
    /// ```
    pub fn try_new_with<E: From<SecretError>>(
        build: impl for<'a> FnOnce(&'a mut MaybeUninit<T>) -> Result<&'a mut T, E>,
    ) -> Result<Self, E> {
        let slot = Self::empty()?;
        // SAFETY: the slot is size_of::<T>() bytes, aligned for T (see `empty`), and nobody else refers to it.
        let place = unsafe { slot.start().cast::<MaybeUninit<T>>().as_mut() };
        let built: *const T = build(place)?;
        // Whoever holds a `&mut T` to this very place has made a T there; one to another place proves nothing.
        if built.cast::<u8>() != slot.start().as_ptr().cast_const() {
            return Err(SecretError::Elsewhere.into());
        }
        Ok(Self { slot, holds: PhantomData })
    }

    fn empty() -> Result<Slot, SecretError> {
        const { assert!(size_of::<T>() > 0 && size_of::<T>() <= SecretBuf::MAX, "a secret has 1 byte to 1 MiB") };
        const { assert!(align_of::<T>() <= 4096, "a secret is aligned to a page at most") };
        GLOBAL.allocate(size_of::<T>(), align_of::<T>())
    }

    /// The value.
    pub fn expose(&self) -> &T {
        // SAFETY: both constructors leave a T at the slot's start, which is aligned for it and stays until drop.
        unsafe { self.slot.start().cast::<T>().as_ref() }
    }

    /// The value, to be changed.
    pub fn expose_mut(&mut self) -> &mut T {
        // SAFETY: as in `expose`; `&mut self` makes this the only reference.
        unsafe { self.slot.start().cast::<T>().as_mut() }
    }
}

impl<T> Drop for SecretBox<T> {
    fn drop(&mut self) {
        // SAFETY: the slot holds a T that nobody refers to any more, and it is dropped only here; the slot itself is wiped and
        // given back after this body.
        unsafe { self.slot.start().cast::<T>().as_ptr().drop_in_place() }
    }
}

fn wipe_place<T>(place: &mut MaybeUninit<T>) {
    // SAFETY: the place is size_of::<T>() bytes, exclusively borrowed; as MaybeUninit it may hold any bytes.
    unsafe { libc::explicit_bzero(place.as_mut_ptr().cast(), size_of::<T>()) }
}

// SAFETY: a box owns its T as `Box` does; moving it to another thread moves the T.
unsafe impl<T: Send> Send for SecretBox<T> {}
// SAFETY: `&SecretBox<T>` gives `&T` and no more.
unsafe impl<T: Sync> Sync for SecretBox<T> {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn secrets_hold_what_was_put_in_and_the_source_is_wiped() {
        let mut source = [3; 32];
        let taken = Secret::take(&mut source).expect("room");
        assert_eq!((taken.expose(), source), (&[3; 32], [0; 32]));
        let mut source = vec![4; 77];
        let taken = SecretBuf::take(&mut source).expect("room");
        assert_eq!((taken.expose(), taken.len()), (&[4; 77][..], 77));
        assert!(source.iter().all(|b| *b == 0));
    }

    #[test]
    fn random_secrets_differ() {
        let (a, b) = (Secret::<32>::random().expect("room"), Secret::random().expect("room"));
        assert!(!a.ct_eq(&b));
        assert!(a.ct_eq(&Secret::copy_of(a.expose()).expect("room")));
    }

    #[test]
    fn secrets_lie_in_pages_that_overlaps_knows() {
        let secret = Secret::<32>::random().expect("room");
        let boxed = SecretBox::new([0_u64; 60]).expect("room");
        let buffer = SecretBuf::with_len(SecretBuf::MAX).expect("room");
        assert!(crate::overlaps(secret.expose().as_ptr(), 32));
        assert!(crate::overlaps(std::ptr::from_ref(boxed.expose()).cast(), 480));
        assert!(crate::overlaps(buffer.expose().as_ptr(), 1));
        assert!(crate::overlaps(&raw const buffer.expose()[SecretBuf::MAX - 1], 1));
        assert!(!crate::overlaps(std::ptr::from_ref(&secret).cast(), size_of_val(&secret)));
    }

    #[test]
    fn lengths_outside_the_range_are_refused() {
        for len in [0, SecretBuf::MAX + 1, usize::MAX] {
            assert!(matches!(SecretBuf::with_len(len), Err(SecretError::Length(l)) if l == len));
        }
        assert!(SecretBuf::take(&mut []).is_err());
    }

    #[repr(align(4096))]
    struct Page([u8; 100]);

    #[test]
    fn boxes_are_aligned_for_what_they_hold() {
        let _odd = Secret::<1>::zeroed().expect("room");
        let page = SecretBox::new(Page([9; 100])).expect("room");
        assert_eq!(std::ptr::from_ref(page.expose()).addr() % 4096, 0);
        assert_eq!(page.expose().0, [9; 100]);
    }

    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_boxed_value_is_dropped_once() {
        let drops = Arc::new(AtomicUsize::new(0));
        let mut boxed = SecretBox::new(Counted(drops.clone())).expect("room");
        assert_eq!(drops.load(Ordering::Relaxed), 0);
        *boxed.expose_mut() = Counted(drops.clone());
        drop(boxed);
        assert_eq!(drops.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_builder_that_fills_another_place_gets_no_box() {
        let elsewhere = SecretBox::<u64>::try_new_with(|_| Ok(Box::leak(Box::new(1))));
        assert!(matches!(elsewhere, Err(SecretError::Elsewhere)));
        let failed = SecretBox::<u64>::try_new_with(|_| Err(SecretError::Length(0)));
        assert!(matches!(failed, Err(SecretError::Length(0))));
    }
}
